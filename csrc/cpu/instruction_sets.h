// Compiles the file named by MINIDISP_TILE once per instruction set, each in its own namespace, and chooses among them
// at run time. If MINIDISP_ONLY is defined, only that set is compiled, given as a number of InstructionSet (host.h).
// Include this inside a namespace that defines struct Kernels; the file must end with `const Kernels kernels = {...};`.
// The file can use VECTOR_BYTES; ROWS, the height of the register block, which is two vectors wide; PAIR_INLINE and
// PAIR_INLINE_LAMBDA; and ROOT_GUESS (approximate 1 / sqrt), defined if the processor has such an instruction.
//
// The environment variable MINIDISP_CPU sets the highest instruction set that may be used (host.h).

#define PAIR_INLINE inline __attribute__((always_inline))
#define PAIR_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(MINIDISP_ONLY) || MINIDISP_ONLY >= 2
#define MINIDISP_HAS_AVX512
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
namespace avx512 {
#define VECTOR_BYTES 64
#define ROWS 14
#define ROOT_GUESS(x) __builtin_ia32_rsqrt14ps512_mask(x, x, -1)
#include MINIDISP_TILE
#undef VECTOR_BYTES
#undef ROWS
#undef ROOT_GUESS
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#if !defined(MINIDISP_ONLY) || MINIDISP_ONLY == 1
#define MINIDISP_HAS_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define VECTOR_BYTES 32
#define ROWS 6
#define ROOT_GUESS(x) __builtin_ia32_rsqrtps256(x)
#include MINIDISP_TILE
#undef VECTOR_BYTES
#undef ROWS
#undef ROOT_GUESS
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif

#if !defined(MINIDISP_ONLY) || MINIDISP_ONLY == 0
#define MINIDISP_HAS_BASELINE
namespace baseline {
#define VECTOR_BYTES 16
#if defined(__aarch64__)
#define ROWS 12
#else
#define ROWS 6
#endif
#include MINIDISP_TILE
#undef VECTOR_BYTES
#undef ROWS
}  // namespace baseline
#endif

const Kernels& choose_kernels() {
  const InstructionSet best = best_instruction_set();  // always one that was compiled
#if defined(MINIDISP_HAS_AVX512)
  if (best >= InstructionSet::avx512) return avx512::kernels;
#endif
#if defined(MINIDISP_HAS_AVX2)
  if (best >= InstructionSet::avx2) return avx2::kernels;
#endif
#if defined(MINIDISP_HAS_BASELINE)
  return baseline::kernels;
#else
  __builtin_unreachable();  // see bindings.cpp
#endif
}
