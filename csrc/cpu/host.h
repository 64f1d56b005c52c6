// What the kernels need from their host: the instruction set, threads and memory. They do not depend on torch;
// bindings.cpp implements these functions with torch.

#pragma once

#include <cstdint>

namespace minidisp {

// Each includes all before it.
enum class InstructionSet { baseline, avx2, avx512, amx };

// The highest one that the processor supports and the environment variable MINIDISP_CPU allows. The variable is read at
// every call, so that a test can try all of them in one process. For amx, the system must give permission too
// (amx_tile.h).
InstructionSet best_instruction_set();

// The number of threads that a call may use: 1 inside a parallel region.
int64_t threads();

// Runs function(begin, end) in parallel, for parts of [begin, end) of at least `grain`.
void run_in_parallel(int64_t begin, int64_t end, int64_t grain, void (*call)(const void*, int64_t, int64_t),
                     const void* function);

template <class Function>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Function& function) {
  const auto call = [](const void* f, int64_t first, int64_t last) {
    (*static_cast<const Function*>(f))(first, last);
  };
  run_in_parallel(begin, end, grain, call, &function);
}

// Uninitialised memory for the duration of a call, from torch's allocator, so that running out of it raises torch's
// error.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  void *owner_, *data_;
};

}  // namespace minidisp
