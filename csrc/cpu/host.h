// What the kernels ask of the program that calls them: the instruction set, threads and memory. They know no torch;
// bindings.cpp answers with torch's.

#pragma once

#include <cstdint>

namespace minidisp {

// Each includes all before it.
enum class InstructionSet { baseline, avx2, avx512, amx };

// The processor's, or what the environment's MINIDISP_CPU allows of it. Read at every call, so that a test can go through them in
// one process. amx is only what the processor says: the system must allow it too (amx_tile.h).
InstructionSet best_instruction_set();

// How many threads a call may use: 1 inside a parallel region.
int64_t threads();

// function(begin, end) for shares of [begin, end) of at least `grain`, on all threads at once.
void run_in_parallel(int64_t begin, int64_t end, int64_t grain, void (*call)(const void*, int64_t, int64_t), const void* function);

template <class Function>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Function& function) {
  const auto call = [](const void* f, int64_t first, int64_t last) { (*static_cast<const Function*>(f))(first, last); };
  run_in_parallel(begin, end, grain, call, &function);
}

// Uninitialised memory for the length of a call, from torch's allocator: that it is short is reported as torch reports it.
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
