// csrc/cuda/ on the CPU: the unmodified kernels, launchers and checks, as minidisp_emulator::forward, ::backward and
// ::cross_entropy_.
//
// A block's threads are fibers. One runs until it waits at a barrier of the block, or at an instruction of its warp,
// which the last of 32 lanes to arrive executes for all (shuffle, ldmatrix, mma, by the fragment layouts of the PTX
// ISA). A warp runs as far as possible before the next one. schedule, bit 0: the last warp first instead of the
// first. Bit 1: cp.async copies when it is issued, the earliest time allowed; otherwise when it is awaited, the latest.
// Shared memory is initialised with NaN in every block, and accesses must be inside it. A wait that never ends,
// or lanes that wait for different things, are errors. Bit 2: only the last block of every grid runs, and only the last
// matrix of every batch is multiplied, which is enough for the last of very many sequences, to test offsets beyond 32
// bits in little time. without: a barrier, file:line, that is skipped.

#define MINIDISP_EMULATOR
#include "../csrc/cuda/bindings.cpp"

#include <ucontext.h>

#include <csetjmp>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
// In its own section, so that the memory of all kernels can be found; the linker defines its bounds.
#define __shared__ static __attribute__((section("emulated_shared")))
extern "C" char __start_emulated_shared[], __stop_emulated_shared[];
#define __syncthreads() emulator::barrier(__FILE__, __LINE__)
#define __launch_bounds__(...)

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
struct Index { unsigned x; };
static Index threadIdx, blockIdx;
static float rsqrtf(float x) { return 1 / std::sqrt(x); }
using std::isinf;
using std::isnan;

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

enum class Wait { none, block, shuffle, ldmatrix, mma, done };
struct Copy { char* to; const void* from; bool wanted; };
struct Thread {
  ucontext_t context;  // where it starts
  jmp_buf jump;        // where it continues: unlike swapcontext, without a system call
  bool begun;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Wait wait;
  void* operands;
  std::vector<std::vector<Copy>> groups;  // of copies in flight; the last one is open
};

std::vector<Thread> threads;
int running, schedule;
int64_t most_matrices;
std::string without;
jmp_buf main_jump;
std::vector<char> shared;
std::function<void()> kernel;

Thread& self() { return threads[running]; }

void wait(Wait what, void* operands = nullptr) {
  self().wait = what;
  self().operands = operands;
  if (_setjmp(self().jump) == 0) _longjmp(main_jump, 1);
}

void barrier(std::string_view file, int line) {
  if (without == std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(line)) return;
  wait(Wait::block);
}

void body() {
  kernel();
  self().wait = Wait::done;
  _longjmp(main_jump, 1);
}

__attribute__((noinline)) void resume(int thread) {
  threadIdx.x = static_cast<unsigned>(running = thread);
  if (_setjmp(main_jump) != 0) return;  // it waits, or is done
  if (self().begun) _longjmp(self().jump, 1);
  self().begun = true;
  setcontext(&self().context);
}

void carry_out(const Copy& copy) {
  if (copy.wanted) std::memcpy(copy.to, copy.from, 16);
  else std::memset(copy.to, 0, 16);
}

void check_shared(const char* p) {
  TORCH_CHECK(p >= shared.data() && p + 16 <= shared.data() + shared.size(), "outside shared memory");
  TORCH_CHECK((p - shared.data()) % 16 == 0, "not aligned to 16 bytes");
}

struct Shuffle { double x; int mask; };
struct Matrices { uint32_t* m; const char* row; };
struct Product { float* d; const uint32_t *a, *b; };

float half(uint32_t bits) {
  return static_cast<float>(c10::Half(static_cast<unsigned short>(bits), c10::Half::from_bits()));
}
// The instruction that all lanes of a warp are waiting for.
void carry_out(Wait what, Thread* lanes) {
  const auto of = [&](int lane, auto* type) -> auto& { return *static_cast<decltype(type)>(lanes[lane].operands); };
  if (what == Wait::shuffle) {
    double x[kLanes];
    for (int l = 0; l < kLanes; ++l) x[l] = of(l ^ of(l, (Shuffle*)0).mask, (Shuffle*)0).x;
    for (int l = 0; l < kLanes; ++l) of(l, (Shuffle*)0).x = x[l];
  } else if (what == Wait::ldmatrix) {
    for (int l = 0; l < kLanes; ++l)
      for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(of(l, (Matrices*)0).m + matrix, of(matrix * 8 + l / 4, (Matrices*)0).row + l % 4 * 4, 4);
  } else {
    float a[16][16], b[16][8];
    for (int l = 0; l < kLanes; ++l) {
      const Product& p = of(l, (Product*)0);
      for (int e = 0; e < 2; ++e) {
        const auto number = [&](uint32_t pair) { return half(pair >> (16 * e) & 0xffff); };
        for (int r = 0; r < 4; ++r) a[l / 4 + r % 2 * 8][l % 4 * 2 + e + r / 2 * 8] = number(p.a[r]);
        for (int r = 0; r < 2; ++r) b[l % 4 * 2 + e + r * 8][l / 4] = number(p.b[r]);
      }
    }
    for (int l = 0; l < kLanes; ++l)
      for (int r = 0; r < 4; ++r) {
        float& d = of(l, (Product*)0).d[r];
        for (int k = 0; k < 16; ++k) d += a[l / 4 + r / 2 * 8][k] * b[k][l % 4 * 2 + r % 2];
      }
  }
}

// Runs a warp until all its threads are done or wait for the block. Returns whether anything happened.
bool run_warp(int warp) {
  bool progress = false;
  for (;;) {
    Thread* lanes = &threads[warp * kLanes];
    for (int l = 0; l < kLanes; ++l)
      if (lanes[l].wait == Wait::none) {
        resume(warp * kLanes + l);
        progress = true;
      }
    const Wait what = lanes[0].wait;
    for (int l = 0; l < kLanes; ++l)
      TORCH_CHECK(lanes[l].wait == what, "lanes 0 and ", l, " of a warp wait for different things");
    if (what == Wait::block || what == Wait::done) return progress;
    carry_out(what, lanes);
    for (int l = 0; l < kLanes; ++l) lanes[l].wait = Wait::none;
  }
}

void run_block() {
  std::fill(shared.begin(), shared.end(), static_cast<char>(0xff));
  std::fill(__start_emulated_shared, __stop_emulated_shared, static_cast<char>(0xff));
  for (Thread& t : threads) {
    t.wait = Wait::none;
    t.begun = false;
    t.groups.assign(1, {});
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStackBytes;
    makecontext(&t.context, body, 0);
  }
  const int warps = static_cast<int>(threads.size()) / kLanes;
  for (;;) {
    bool progress = false;
    for (int w = 0; w < warps; ++w) progress |= run_warp(schedule & 1 ? warps - 1 - w : w);
    bool done = true;
    for (const Thread& t : threads) done &= t.wait == Wait::done;
    if (done) return;
    TORCH_CHECK(progress, "the threads wait for ever");
    for (Thread& t : threads)
      if (t.wait == Wait::block) t.wait = Wait::none;
  }
}

}  // namespace emulator

namespace minidisp::cuda {

// Of host.h.
void multiply(const Matrices& c, const Matrices& left, const Matrices& right, bool add) {
  const at::Tensor out = tensor_of(c), a = tensor_of(left), b = tensor_of(right);
  TORCH_CHECK(a.size(0) <= emulator::most_matrices, "more matrices than cuBLAS is known to take");
  const int64_t first = emulator::schedule & 4 ? a.size(0) - 1 : 0, n = a.size(0) - first;
  const auto wide = [&](const at::Tensor& x) { return x.narrow(0, first, n).to(out.scalar_type()); };
  const at::Tensor product = at::bmm(wide(a), wide(b));
  if (add) out.narrow(0, first, n).add_(product);
  else out.narrow(0, first, n).copy_(product);
}

// Of device.h.
namespace {

char* shared_memory() { return emulator::shared.data(); }

void copy_async(char* to, const void* from, bool wanted) {
  emulator::check_shared(to);
  TORCH_CHECK(reinterpret_cast<uintptr_t>(from) % 16 == 0, "copies from an address not aligned to 16 bytes");
  const emulator::Copy copy{to, from, wanted};
  if (emulator::schedule & 2) emulator::carry_out(copy);
  else emulator::self().groups.back().push_back(copy);
}
void copy_commit() { emulator::self().groups.emplace_back(); }
template <int kPending>
void copy_wait() {
  auto& groups = emulator::self().groups;
  while (groups.size() > kPending + 1) {
    for (const emulator::Copy& copy : groups.front()) emulator::carry_out(copy);
    groups.erase(groups.begin());
  }
}

void load_matrices(uint32_t (&m)[4], const char* row) {
  emulator::check_shared(row);
  emulator::Matrices operands{m, row};
  emulator::wait(emulator::Wait::ldmatrix, &operands);
}
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emulator::Product operands{d, a, b};
  emulator::wait(emulator::Wait::mma, &operands);
}
template <class T>
T shuffle_xor(T x, int mask) {
  emulator::Shuffle operands{static_cast<double>(x), mask};
  emulator::wait(emulator::Wait::shuffle, &operands);
  return static_cast<T>(operands.x);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int count, int shared_bytes, Arguments... arguments) {
  emulator::shared.assign(shared_bytes, 0);
  emulator::threads.resize(count);
  emulator::kernel = [=] { kernel(arguments...); };
  for (int64_t block = emulator::schedule & 4 ? std::max<int64_t>(blocks - 1, 0) : 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    emulator::run_block();
  }
}

void fill_with_zeros(void* to, int64_t bytes) { std::memset(to, 0, static_cast<size_t>(bytes)); }

}  // namespace
}  // namespace minidisp::cuda

#include "../csrc/cuda/cross_entropy.cu"
#include "../csrc/cuda/dispersion.cu"

// workspace: the fields of Workspace in order, or nothing.
static std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& z, c10::string_view variant, double tau,
                                                              double clamp, double eps, bool need_grad, bool exact,
                                                              at::IntArrayRef workspace, int64_t schedule,
                                                              c10::string_view without) {
  minidisp::cuda::Workspace space;
  if (!workspace.empty()) {
    TORCH_CHECK(workspace.size() == 6);
    space = {workspace[0], workspace[1], workspace[2], workspace[3], workspace[4], workspace[5]};
  }
  emulator::schedule = static_cast<int>(schedule);
  emulator::most_matrices = space.sequences;
  emulator::without = std::string(without);
  return minidisp::cuda::forward_in(z, variant, tau, clamp, eps, need_grad, exact, space);
}

static at::Tensor backward(const at::Tensor& upstream, const at::Tensor& z, const at::Tensor& product,
                           const at::Tensor& state, c10::string_view variant, int64_t schedule) {
  emulator::schedule = static_cast<int>(schedule);
  return minidisp::cuda::backward_in(upstream, z, product, state, variant);
}

static at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& targets, int64_t ignored, bool need_grad,
                                int64_t schedule, c10::string_view without) {
  emulator::schedule = static_cast<int>(schedule);
  emulator::without = std::string(without);
  return minidisp::cuda::cross_entropy_in(logits, targets, ignored, need_grad);
}

TORCH_LIBRARY(minidisp_emulator, m) {
  m.def("forward(Tensor z, str variant, float tau, float clamp, float eps, bool need_grad, bool exact, int[] workspace,"
        " int schedule, str without) -> (Tensor, Tensor, Tensor)",
        forward);
  m.def("backward(Tensor upstream, Tensor z, Tensor product, Tensor state, str variant, int schedule) -> Tensor",
        backward);
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets, int ignored, bool need_grad, int schedule, str without)"
        " -> Tensor",
        cross_entropy);
}
