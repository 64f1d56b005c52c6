// Shared by the code for AMX tiles: products of bfloat16, sums in float. A tile of A holds 16 rows of 32 numbers; a
// tile of B, 16 columns of 32 numbers in pairs (row r has numbers 2r and 2r + 1 of each column); a tile of C, 16 x 16
// floats.
//
// MINIDISP_AMX is defined if the compiler supports the instructions and this build includes them (instruction_sets.h).
// Code that uses them is enclosed in MINIDISP_AMX_BEGIN and MINIDISP_AMX_END.

#pragma once

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11) && \
    (!defined(MINIDISP_ONLY) || MINIDISP_ONLY >= 3)
#define MINIDISP_AMX

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

#if defined(__clang__)
#define MINIDISP_AMX_BEGIN                                                                               \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,\
fma,amx-tile,amx-bf16\"))), apply_to = function)")
#define MINIDISP_AMX_END _Pragma("clang attribute pop")
#else
#define MINIDISP_AMX_BEGIN    \
  _Pragma("GCC push_options") \
  _Pragma("GCC target(\"avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16\")")
#define MINIDISP_AMX_END _Pragma("GCC pop_options")
#endif

namespace minidisp {

// Whether the processor has AMX tiles, AMX-BF16 and AVX512-BF16, and the system permits this process to use them.
inline bool amx_permitted() {
  static const bool permitted = [] {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx >> 22 & 1) || !(edx >> 24 & 1)) return false;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax >> 5 & 1)) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return permitted;
}

}  // namespace minidisp

MINIDISP_AMX_BEGIN

namespace minidisp {
namespace {

using Bits = uint16_t;          // a bfloat16
constexpr int64_t kTile = 512;  // bfloat16 numbers in a tile; it holds 256 floats

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the thread's tiles for this code, and restores their previous configuration in the end.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    static const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette != 0) _tile_loadconfig(&before_);
    else _tile_release();
  }

 private:
  TileConfig before_;
};

// C = A B, or C += A B, for a block of 2 x 2 tiles of C, at c, c + right, c + down and c + down + right, with rows ld
// apart. The tiles of A are contiguous along the depth; those of its lower 16 rows follow a_down later. The tiles of B
// are b_step apart; those of its right 16 columns follow b_right later.
inline void multiply_block(const Bits* a, int64_t a_down, const Bits* b, int64_t b_step, int64_t b_right, int64_t steps,
                           float* c, int64_t down, bool add, int64_t right = 256, int64_t ld = 16) {
  const int64_t bytes = 4 * ld;
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + right, bytes);
    _tile_loadd(2, c + down, bytes);
    _tile_loadd(3, c + down + right, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, a + s * kTile, 64);
    _tile_loadd(6, b + s * b_step, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + s * b_step + b_right, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + s * kTile + a_down, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + right, bytes);
  _tile_stored(2, c + down, bytes);
  _tile_stored(3, c + down + right, bytes);
  asm volatile("" ::: "memory");  // the compiler does not see that the tiles write to memory
}

inline void transpose16(__m512i r[16]) {  // a 16 x 16 matrix of 32-bit numbers
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Two rows of floats, rounded to bfloat16, as one row of a tile of B, in pairs.
inline __m512i pairs(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_add_epi32(_mm512_castps_si512(odd), half));
}

inline __mmask16 first_of(int64_t count) { return static_cast<__mmask16>((1u << std::min<int64_t>(count, 16)) - 1); }
constexpr int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace
}  // namespace minidisp

MINIDISP_AMX_END

#endif
