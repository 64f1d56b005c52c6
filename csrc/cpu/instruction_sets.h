// Compiles the file named by MINIDISP_TILE once per instruction set, each time in a namespace of its own, and chooses among them.
// MINIDISP_ONLY, if defined, is the one set to compile for, as a number of InstructionSet (host.h); otherwise all are compiled.
// The includer stands in a namespace of its own and defines struct Kernels; the file ends with `const Kernels kernels = {...};`.
// It finds defined: VECTOR_BYTES; ROWS, of the register block, two vectors wide; PAIR_INLINE, PAIR_INLINE_LAMBDA; and, where the
// processor has one, ROOT_GUESS (1 / sqrt, roughly).
//
// The environment's MINIDISP_CPU names the highest set that may be used (host.h).

#define PAIR_INLINE inline __attribute__((always_inline))
#define PAIR_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(MINIDISP_ONLY) || MINIDISP_ONLY >= 2
#define MINIDISP_HAS_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
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
  const InstructionSet best = best_instruction_set();  // one that is compiled
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
