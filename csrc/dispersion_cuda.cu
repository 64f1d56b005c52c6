// The dispersion loss and its gradient on CUDA devices, sm_80 and later, in one pass over the pairs of tokens.
//
// As on the CPU, a sequence's loss is a sum over pairs of a function of S_ij = u_i.u_j with u_i = z_i / length_i (l2_repel: of
// the distance), whose slope W_ij gives the gradient G = W U. Three phases, for as many sequences, or rows of a long one, as
// fit into a fixed workspace:
//   A  S and W        B  G = W U, a batched product by cuBLAS        C  G / sum, back through the normalisation, once at the end
//
// By tiles: bfloat16 and float16, angular_spread and orthogonalization. Phase A is one tensor-core kernel on the tiles I <= J
// of 128 x 128 pairs. It multiplies z as it is, so products are exact, sums are float32 as tensor cores make them, and
// c_ij = S_ij / (length_i length_j) rounds no u. It stores W_ij / length_j and, mirrored, W_ij / length_i, in the type of z, for
// B to multiply with z. Their rounding, independent from pair to pair, weighs no more than that of the gradient in this type,
// unless the sum nearly cancels.
//   Memory traffic per sequence: z is read from L2 L / 128 times by A; W, 2 L^2 bytes, is written once and read once, and a group
//   of sequences is small enough for W to come from the L2 of large devices; the gradient is written by B, rewritten by C.
// By blocks: float32, which must stay exact, decorrelation, whose centred tokens no 16-bit type holds, and l2_repel, in double
// as differences of nearly equal tokens need it. S is a product by cuBLAS (float32 under the user's allow_tf32, as the plain
// version), W replaces it in place, on blocks of at most 16 MB of rows I and columns J >= I; the gradient comes by W and W^T.
//   Memory traffic per sequence: S is written, rewritten as W and read twice, all of it L2-sized.
//
// The same input gives the same bits: sums over pairs are in double, one slot per tile or row, added in a fixed order; no atomics.
// Nothing waits for the device. Memory beyond the gradient: 64 MB at most, and a few numbers per token, whatever B, T and C.
// Without nvcc this file is plain C++: tests/cuda_emulator.cpp runs it on the CPU, with its own version of the few functions below.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

#include "dispersion.h"

// What only a device has, each in a function of its own
#if defined(__CUDACC__)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "dispersion_cuda.cu needs sm_80 or later: leave older devices out of TORCH_CUDA_ARCH_LIST"
#endif

namespace minidisp {
namespace {

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// 16 bytes from global to shared memory, without waiting; zeros instead of them unless wanted.
__device__ __forceinline__ void copy_async(char* to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>  // groups that may still be under way
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

// Four matrices of 8 x 8 numbers of 16 bit; lane l names row l % 8 of matrix l / 8, and gets 2 numbers of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))) : "memory");
}

// d += a b, 16 x 8 x 16, by a warp.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, c10::BFloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, c10::Half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Calls kernel(arguments...) on the current stream.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Arguments... arguments) {
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024)
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// out = a b, or out += a b, for batches of matrices; out may be float32 where a and b have 16 bits.
void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add) {
  if (out.scalar_type() == a.scalar_type()) {
    if (add) at::baddbmm_out(out, out, a, b);
    else at::bmm_out(out, a, b);
  } else {
    if (add) at::baddbmm_out(out, out, a, b, out.scalar_type());
    else at::bmm_out(out, a, b, out.scalar_type());
  }
}

}  // namespace
}  // namespace minidisp
#endif

namespace minidisp {
namespace {

// What dispersion_pair.h asks for. rsqrtf is off by 2 units in the last place at most and expf by 2, as the CPU's.
#define PAIR_INLINE __device__ __forceinline__
PAIR_INLINE float lesser(float a, float b) { return fminf(a, b); }
PAIR_INLINE float greater(float a, float b) { return fmaxf(a, b); }
PAIR_INLINE float magnitude(float a) { return fabsf(a); }
PAIR_INLINE float choose(float sign, float negative, float positive) { return sign < 0.0f ? negative : positive; }
PAIR_INLINE float inverse_root(float x) { return rsqrtf(x); }
PAIR_INLINE float exponential(float x) { return expf(x); }
#include "dispersion_pair.h"

struct Largest {  // the cosine itself, of which the largest is wanted
  PAIR_INLINE void operator()(float c, float* value, float* weight) const { *value = c, *weight = 0; }
};

// Kernels

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class Real>
struct Tokens {  // z, and what is known of its B T tokens; u = (z - mean) / length
  const void* z;
  int64_t stride[3], T, C;
  Real *mean, *norm, *length;  // length is NaN for a token with NaN or infinity, and infinite for one without direction
};

__device__ __forceinline__ double warp_sum(double x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
__device__ __forceinline__ double warp_max(double x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const double other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}
__device__ __forceinline__ int64_t global_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
}
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

template <class T, class Real>
__device__ __forceinline__ const T* token(const Tokens<Real>& k, int64_t b, int64_t i) {
  return static_cast<const T*>(k.z) + b * k.stride[0] + i * k.stride[1];
}

// Cosines: mean (decorrelation only, else 0), norm and length of a token, by a warp.
template <class T>
__global__ void measure(Tokens<float> k, int64_t tokens, bool centre, double eps) {
  const int64_t n = global_warp();
  if (n >= tokens) return;
  const T* z = token<T>(k, n / k.T, n % k.T);
  float sum = 0, most = 0, squares = 0, rest = 0, bad = 0;
  if (centre)
    for (int64_t d = lane(); d < k.C; d += 32) {
      const float x = static_cast<float>(z[d * k.stride[2]]);
      sum += x;
      most = fmaxf(most, fabsf(x));
    }
  const float mean = centre ? static_cast<float>(warp_sum(sum) / static_cast<double>(k.C)) : 0.0f;
  for (int64_t d = lane(); d < k.C; d += 32) {
    const float x = static_cast<float>(z[d * k.stride[2]]), centred = x - mean;
    bad += x * 0.0f;
    squares += centred * centred;
    rest = fmaxf(rest, fabsf(centred));
  }
  float norm = sqrtf(static_cast<float>(warp_sum(squares)));
  const bool poisoned = !(warp_sum(bad) == 0) || isinf(norm);
  // A constant token: what centring leaves of it is no direction.
  if (centre && warp_max(rest) <= 4 * 1.1920929e-7 * warp_max(most)) norm = 0;
  float length = static_cast<float>(static_cast<double>(norm) + eps);
  if (length == 0) length = INFINITY;
  if (poisoned) length = NAN;
  if (lane() == 0) {
    k.mean[n] = mean;
    k.norm[n] = norm;
    k.length[n] = length;
  }
}

// l2_repel: the mean token of a sequence, a feature per thread.
template <class T>
__global__ void find_mean_token(Tokens<double> k, int64_t features) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= features) return;
  const T* z = token<T>(k, n / k.C, 0) + n % k.C * k.stride[2];
  double sum = 0;
  for (int64_t i = 0; i < k.T; ++i) sum += static_cast<double>(static_cast<float>(z[i * k.stride[1]]));
  k.mean[n] = sum / static_cast<double>(k.T);
}

// l2_repel: squares of the distance from the mean token (in norm) and from the origin (in length), by a warp.
template <class T>
__global__ void measure_squares(Tokens<double> k, int64_t tokens) {
  const int64_t n = global_warp();
  if (n >= tokens) return;
  const T* z = token<T>(k, n / k.T, n % k.T);
  double centred_square = 0, square = 0;
  for (int64_t d = lane(); d < k.C; d += 32) {
    const double x = static_cast<double>(static_cast<float>(z[d * k.stride[2]])), centred = x - k.mean[n / k.T * k.C + d];
    square += x * x;
    centred_square += centred * centred;
  }
  centred_square = warp_sum(centred_square);
  square = warp_sum(square);
  if (lane() == 0) {
    k.norm[n] = centred_square;
    k.length[n] = square;
  }
}

// rows of u, or of centred tokens with a one behind each, of the sequences from b on, from token i on: (sequences, rows, width).
template <class T, class Real>
__global__ void fill_rows(Tokens<Real> k, int64_t b, int64_t i, int64_t rows, int64_t elements, Real* out) {
  constexpr bool kByDistance = std::is_same_v<Real, double>;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= elements) return;
  const int64_t width = k.C + kByDistance, d = n % width, row = n / width;
  b += row / rows;
  i += row % rows;
  if (d == k.C) {
    out[n] = 1;
    return;
  }
  const Real x = static_cast<Real>(static_cast<float>(token<T>(k, b, i)[d * k.stride[2]]));
  if constexpr (kByDistance) out[n] = x - k.mean[b * k.C + d];
  else out[n] = (x - k.mean[b * k.T + i]) / k.length[b * k.T + i];
}

__device__ __forceinline__ AngularSpread shifted(AngularSpread pair, double shift) {
  pair.shift = static_cast<float>(shift);
  return pair;
}
template <class Pair>
__device__ __forceinline__ Pair shifted(Pair pair, double) { return pair; }

struct Distance {  // exp(-||z_i - z_j||^2 / tau), from 2 z_i.z_j - ||z_i||^2 - ||z_j||^2
  double inverse_tau;
};

// Replaces products by weights and adds the values of each row's pairs j > i to sums[b][i] (Largest: keeps the largest), a warp
// per row. s holds rows x columns products per sequence from b on, of tokens from i0 on with tokens from j0 on; what lies in
// the square of the rows themselves (j0 == i0) is needed twice, but counted once.
template <class Real, class Pair>
__global__ void weigh(Tokens<Real> k, Pair pair, const double* shift, int64_t b, int64_t i0, int64_t j0, int64_t rows,
                      int64_t columns, int64_t all_rows, bool need_grad, Real* s, double* sums) {
  constexpr bool kFind = std::is_same_v<Pair, Largest>;
  const int64_t n = global_warp();
  if (n >= all_rows) return;
  b += n / rows;
  const int64_t i = i0 + n % rows;
  s += n * columns;
  if constexpr (!std::is_same_v<Pair, Distance>) pair = shifted(pair, shift[b]);
  double sum = kFind ? -2 : 0;
  for (int64_t c = lane(); c < columns; c += 32) {
    const int64_t j = j0 + c;
    Real value, weight;
    if constexpr (std::is_same_v<Pair, Distance>) {
      const double x = (2 * s[c] - k.norm[b * k.T + i] - k.norm[b * k.T + j]) * pair.inverse_tau;
      value = weight = static_cast<double>(expf(static_cast<float>(fmin(fmax(x, -100.0), 0.0))));
    } else {
      pair(s[c], &value, &weight);
    }
    if constexpr (kFind) sum = j != i && value > sum ? value : sum;
    else if (j > i) sum += value;
    if (!kFind && need_grad) s[c] = j == i ? 0 : weight;
  }
  sum = kFind ? warp_max(sum) : warp_sum(sum);
  if (lane() == 0) {
    double& slot = sums[b * k.T + i];
    slot = kFind ? fmax(slot, sum) : slot + sum;
  }
}

// l2_repel: grad += (W x)_i - (W 1)_i x_i; both sums are in product (sequences, rows, C + 1), x as fill_rows has made it.
template <class Real>
__global__ void add_differences(int64_t b, int64_t i, int64_t rows, int64_t T, int64_t C, int64_t elements, const Real* product,
                                const Real* x, int64_t x_stride, float* grad) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= elements) return;
  const int64_t d = n % C, row = n / C % rows, sequence = n / C / rows;
  const Real* p = product + (sequence * rows + row) * (C + 1);
  const Real difference = p[d] - p[C] * x[sequence * x_stride + row * (C + 1) + d];
  grad[((b + sequence) * T + i + row) * C + d] += static_cast<float>(difference);
}

// The tensor-core kernel, a block per pair of tiles.
constexpr int kTile = 128;
constexpr int kDepth = 32;  // features per stage
constexpr int kStages = 4;
constexpr int kStageBytes = 2 * kTile * kDepth * 2;
constexpr int kStagedStride = kTile + 8;  // numbers; the 16 bytes keep the rows of a tile in different banks
constexpr int kTileBytes = std::max(kStages * kStageBytes, 2 * kTile * kStagedStride * 2);

// Where 16 bytes (a chunk of 8 features) of a row of a stage lie: permuted so that 8 rows of a matrix meet all banks.
__device__ __forceinline__ int chunk_offset(int row, int chunk) { return row * kDepth * 2 + (chunk ^ (row / 2 % 4)) * 16; }

// Rows I0 <= I < I1 of tiles with all tiles J >= I, numbered: first the pairs inside the square, then those beyond it.
struct Strip {
  int64_t I0, I1, tiles;
  MINIDISP_BOTH int64_t square() const { return block_pairs(I1 - I0); }
  MINIDISP_BOTH int64_t size() const { return square() + (I1 - I0) * (tiles - I1); }
  MINIDISP_BOTH void find(int64_t number, int64_t* I, int64_t* J) const {
    if (number < square()) {
      block_pair(number, I, J);
      *I += I0, *J += I0;
    } else {
      *I = I0 + (number - square()) % (I1 - I0);
      *J = I1 + (number - square()) / (I1 - I0);
    }
  }
};

// Writes W_ij scale / length_j to upper, (sequences, 128 (I1 - I0), 128 (tiles - I0)), from row and column 128 I0 on, below the
// diagonal too, and, for columns from 128 I1 on, W_ij scale / length_i to lower, (sequences, 128 (tiles - I1), 128 (I1 - I0)).
// The sum of the tile's values goes to sums[b][first_sum + number of the tile]. Rows of z start at multiples of 16 bytes.
template <class T, class Pair>
__global__ void __launch_bounds__(kThreads, 2)
    weigh_tiles(Tokens<float> k, Pair pair, const double* shift, int64_t b0, Strip strip, float scale, bool need_grad, T* upper,
                T* lower, double* sums, int64_t sums_stride, int64_t first_sum) {
  constexpr bool kFind = std::is_same_v<Pair, Largest>;
  __shared__ float row_inverse[kTile], column_inverse[kTile];  // 1 / length
  __shared__ double warp_sums[kWarps];
  char* const memory = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int64_t sequence = blockIdx.x / strip.size(), number = blockIdx.x % strip.size(), b = b0 + sequence;
  int64_t I, J;
  strip.find(number, &I, &J);

  const int64_t own = (thread < kTile ? I : J) * kTile + thread % kTile;
  (thread < kTile ? row_inverse : column_inverse)[thread % kTile] = own < k.T ? 1.0f / k.length[b * k.T + own] : 0.0f;

  // A stage is 2 x 128 rows of 4 chunks: a thread copies 4 of them, always the same chunk of rows 64 apart.
  const T* source[4];
  bool exists[4];
  for (int q = 0; q < 4; ++q) {
    const int64_t i = (q < 2 ? I : J) * kTile + q % 2 * 64 + thread / 4;
    exists[q] = i < k.T;
    source[q] = token<T>(k, b, exists[q] ? i : 0) + thread % 4 * 8;
  }
  const auto fetch = [&](int64_t step) {
    char* stage = memory + step % kStages * kStageBytes;
    const bool inside = step * kDepth + thread % 4 * 8 < k.C;  // C is a multiple of 8
    for (int q = 0; q < 4; ++q) {
      char* to = stage + q / 2 * (kStageBytes / 2) + chunk_offset(q % 2 * 64 + thread / 4, thread % 4);
      copy_async(to, inside ? source[q] + step * kDepth : source[q] - thread % 4 * 8, inside && exists[q]);
    }
  };

  // A warp's part of the tile is 64 x 32: 4 x 4 products of 16 x 8.
  const int top = warp / 4 * 64, left = warp % 4 * 32;
  float s[4][4][4] = {};
  const int64_t steps = (k.C + kDepth - 1) / kDepth;
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    copy_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this stage is there for all, and all have left the one that is fetched next
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    copy_commit();
    const char* rows = memory + step % kStages * kStageBytes;
    const char* columns = rows + kStageBytes / 2;
#pragma unroll
    for (int half = 0; half < kDepth / 16; ++half) {
      uint32_t a[4][4], c[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        load_matrices(a[m], rows + chunk_offset(top + m * 16 + lane() % 16, half * 2 + lane() / 16));
#pragma unroll
      for (int n = 0; n < 2; ++n)
        load_matrices(c[n], columns + chunk_offset(left + n * 16 + lane() / 16 * 8 + lane() % 8, half * 2 + lane() / 8 % 2));
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_add(s[m][n], a[m], c[n / 2] + n % 2 * 2, T());
    }
  }
  copy_wait<0>();
  __syncthreads();  // the stages are free

  // s[m][n][2 h + e] is the product of row top + 16 m + 8 h + lane / 4 and column left + 8 n + 2 (lane % 4) + e.
  T* const direct = reinterpret_cast<T*>(memory);
  T* const mirrored = direct + kTile * kStagedStride;
  const bool diagonal = I == J;
  const int64_t rows_left = k.T - I * kTile, columns_left = k.T - J * kTile;
  pair = shifted(pair, shift[b]);
  double sum = kFind ? -2 : 0;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = top + m * 16 + h * 8 + lane() / 4;
      const float inverse = row_inverse[row];
      float row_sum = kFind ? -2 : 0;
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = left + n * 8 + lane() % 4 * 2 + e;
          const bool real = row < rows_left && column < columns_left && !(diagonal && row == column);
          float value, weight;
          pair(s[m][n][h * 2 + e] * inverse * column_inverse[column], &value, &weight);
          if constexpr (kFind) {
            row_sum = real ? fmaxf(row_sum, value) : row_sum;
          } else {
            row_sum += real && (!diagonal || column > row) ? value : 0.0f;
            if (!need_grad) continue;
            weight = real ? weight * scale : 0.0f;
            direct[row * kStagedStride + column] = static_cast<T>(weight * column_inverse[column]);
            if (!diagonal) mirrored[column * kStagedStride + row] = static_cast<T>(weight * inverse);
          }
        }
      sum = kFind ? fmax(sum, static_cast<double>(row_sum)) : sum + row_sum;
    }
  sum = kFind ? warp_max(sum) : warp_sum(sum);
  if (lane() == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (thread == 0) {
    for (int w = 1; w < kWarps; ++w) sum = kFind ? fmax(sum, warp_sums[w]) : sum + warp_sums[w];
    sums[b * sums_stride + first_sum + number] = sum;
  }
  if (kFind || !need_grad) return;

  // The staged tiles go out in rows of 256 bytes, 16 threads each.
  const int64_t height = (strip.I1 - strip.I0) * kTile, width = (strip.tiles - strip.I0) * kTile;
  const auto store = [&](const T* tile, T* out, int64_t stride) {
    for (int row = thread / 16; row < kTile; row += kThreads / 16)
      *reinterpret_cast<uint4*>(out + row * stride + thread % 16 * 8) =
          *reinterpret_cast<const uint4*>(tile + row * kStagedStride + thread % 16 * 8);
  };
  upper += sequence * height * width;
  store(direct, upper + ((I - strip.I0) * width + (J - strip.I0)) * kTile, width);
  if (diagonal) return;
  if (J < strip.I1) store(mirrored, upper + ((J - strip.I0) * width + (I - strip.I0)) * kTile, width);
  else store(mirrored, lower + sequence * (width - height) * height + ((J - strip.I1) * height + (I - strip.I0)) * kTile, height);
}

// Sums or largest of a sequence's slots, by one block; the same order every time.
template <bool kFind>
__device__ __forceinline__ double block_reduce(const double* slots, int64_t n, double (&shared)[kWarps]) {
  double sum = kFind ? -2 : 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum = kFind ? fmax(sum, slots[i]) : sum + slots[i];
  sum = kFind ? warp_max(sum) : warp_sum(sum);
  __syncthreads();
  if (lane() == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = shared[0];
  for (int w = 1; w < kWarps; ++w) sum = kFind ? fmax(sum, shared[w]) : sum + shared[w];
  return sum;
}

// A block per sequence: the smallest angle that occurs, from the largest cosines.
__global__ void find_shift(const double* most, int64_t slots, double clamp, double* shift) {
  __shared__ double shared[kWarps];
  const double c = block_reduce<true>(most + blockIdx.x * slots, slots, shared);
  if (threadIdx.x == 0) shift[blockIdx.x] = acos(fmin(fmax(c, clamp - 1), 1 - clamp));
}

// A block per sequence: its loss, and the factor between W U and the gradient. sums are over the pairs i < j.
template <class Real>
__global__ void finish_sequence(Tokens<Real> k, Variant variant, double tau, const double* sums, int64_t slots,
                                const double* shift, double batch, double* loss, float* scale) {
  __shared__ double shared[kWarps];
  const int64_t b = blockIdx.x;
  const double tokens = static_cast<double>(k.T), pairs = tokens * (tokens - 1);
  const double sum = block_reduce<false>(sums + b * slots, slots, shared);
  double own = 0;  // NaN if a token is
  for (int64_t i = threadIdx.x; i < k.T; i += kThreads) {
    const double x = static_cast<double>(k.length[b * k.T + i]);
    if constexpr (std::is_same_v<Real, double>) own += x;
    else own += isnan(x) ? x : 0.0;
  }
  own = warp_sum(own);
  __syncthreads();
  if (lane() == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  own = 0;
  for (double x : shared) own += x;
  double value, factor;
  if (variant == Variant::angular_spread) {
    value = log(2 * sum / pairs) - shift[b] / (kPi * tau);
    factor = 1 / (kPi * tau * sum);
  } else if (variant == Variant::l2_repel) {
    value = log((2 * sum + tokens) / (tokens * tokens)) + 0.1 * own / (tokens * static_cast<double>(k.C));
    factor = 4 / (tau * (2 * sum + tokens));
  } else {
    value = 2 * sum / pairs;
    factor = variant == Variant::orthogonalization ? 4 / (kPi * pairs) : 4 / pairs;
  }
  loss[b] = value + own * 0;
  scale[b] = static_cast<float>((factor + own * 0) / batch);
}

// Cosines: scale W U becomes the gradient, through the division by length and through the centring; a warp per token.
template <class T>
__global__ void finish_tokens(Tokens<float> k, int64_t tokens, const float* scales, float inverse_weight_scale, bool centre,
                              float* grad) {
  const int64_t n = global_warp();
  if (n >= tokens) return;
  const int64_t b = n / k.T;
  const T* z = token<T>(k, b, n % k.T);
  float* g = grad + n * k.C;
  const float mean = k.mean[n], norm = k.norm[n], length = k.length[n], scale = scales[b] * inverse_weight_scale;
  float dot = 0, g_sum = 0, u_sum = 0;
  for (int64_t d = lane(); d < k.C; d += 32) {
    const float u = (static_cast<float>(z[d * k.stride[2]]) - mean) / length, x = g[d] * scale;
    dot += x * u;
    g_sum += x;
    u_sum += u;
  }
  const double dots = warp_sum(dot), g_sums = warp_sum(g_sum), u_sums = warp_sum(u_sum);
  const float radial = norm == 0 ? 0.0f : static_cast<float>(dots / norm);
  const double shift = centre && norm != 0 ? (g_sums / length - radial * u_sums) / static_cast<double>(k.C) : 0;
  for (int64_t d = lane(); d < k.C; d += 32) {
    const float u = (static_cast<float>(z[d * k.stride[2]]) - mean) / length;
    g[d] = g[d] * scale / length - u * radial - static_cast<float>(shift);
  }
}

// l2_repel: scales the gradient and adds that of 0.1 mean(z^2).
template <class T>
__global__ void finish_distances(Tokens<double> k, int64_t elements, const float* scales, float pull, float* grad) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= elements) return;
  const int64_t d = n % k.C, i = n / k.C % k.T, b = n / k.C / k.T;
  grad[n] = grad[n] * scales[b] + pull * static_cast<float>(token<T>(k, b, i)[d * k.stride[2]]);
}

// Launchers

struct Workspace {  // bytes; in all at most 64 MB
  int64_t tile_weights = 32 << 20, tile_tokens = 16 << 20;                               // by tiles: W, a copy of z if need be
  int64_t weights = 16 << 20, tokens = 36 << 20;                                         // by blocks: W, U
  int64_t wide_tokens = 20 << 20, wide_products = 20 << 20, longest_row = 8192;          // l2_repel: centred z, W z
};

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t blocks_for(int64_t threads) { return divide_up(threads, kThreads); }
int64_t blocks_for_warps(int64_t warps) { return divide_up(warps, kWarps); }

// One call. T: the type of z. Real: of the arithmetic, float or, for l2_repel, double.
template <class T, class Real>
struct Call {
  static constexpr bool kByDistance = std::is_same_v<Real, double>;

  const at::Tensor& z;
  const Options o;
  const bool need_grad;
  const Workspace space;
  at::Tensor grad;
  const int64_t B = z.size(0), L = z.size(1), D = z.size(2);
  const bool centre = o.variant == Variant::decorrelation;
  const at::TensorOptions options = z.options();
  const at::Tensor mean = empty<Real>({B, kByDistance ? D : L}), norm = empty<Real>({B, L}), length = empty<Real>({B, L});
  const Tokens<Real> known{z.const_data_ptr(),          {z.stride(0), z.stride(1), z.stride(2)}, L, D, pointer<Real>(mean),
                           pointer<Real>(norm), pointer<Real>(length)};
  const at::Tensor shift = at::full({B}, o.smallest_angle(), options.dtype(at::kDouble));

  template <class U>
  at::Tensor empty(at::IntArrayRef sizes) const {
    return at::empty(sizes, options.dtype(c10::CppTypeToScalarType<U>::value));
  }
  template <class U>
  static U* pointer(const at::Tensor& x) { return static_cast<U*>(x.mutable_data_ptr()); }

  // Runs f with the pair weights of the variant.
  template <class F>
  void with_pair(F f) const {
    const float limit = static_cast<float>(1 - o.clamp);
    if constexpr (kByDistance) f(Distance{1 / o.tau});
    else if (o.variant == Variant::angular_spread) f(AngularSpread{limit, 0, static_cast<float>(1 / (kPi * o.tau))});
    else if (o.variant == Variant::orthogonalization) f(Orthogonalization{limit});
    else f(Decorrelation{});
  }

  void measure_tokens() const {
    if constexpr (kByDistance) {
      launch(find_mean_token<T>, blocks_for(B * D), kThreads, 0, known, B * D);
      launch(measure_squares<T>, blocks_for_warps(B * L), kThreads, 0, known, B * L);
    } else {
      launch(measure<T>, blocks_for_warps(B * L), kThreads, 0, known, B * L, centre, centre ? 0.0 : o.eps);
    }
  }

  // Phases A and B by blocks. pair: of the variant, or Largest, and then without B. sums: (B, L).
  template <class Pair>
  void by_blocks(Pair pair, const at::Tensor& sums) {
    const bool weights_wanted = need_grad && !std::is_same_v<Pair, Largest>;
    const int64_t width = D + kByDistance, size = sizeof(Real), most_columns = std::min(L, space.longest_row);
    int64_t token_rows = (kByDistance ? space.wide_tokens : space.tokens) / (width * size);
    if (kByDistance) token_rows = std::min(token_rows, space.wide_products / (width * size));
    const int64_t quarter = std::min(L, std::max<int64_t>(kTile, divide_up(L, 4)));  // the lower triangle is mostly left out
    const int64_t pairs = space.weights / size;
    // Either all tokens of n sequences are at hand, or those of a block of rows and those of a block of columns.
    const bool resident = token_rows >= L;
    const int64_t n = resident ? std::clamp<int64_t>(std::min(token_rows / L, pairs / (most_columns * quarter)), 1, B) : 1;
    const int64_t columns = resident ? most_columns : std::clamp<int64_t>(token_rows * 4 / 5, 1, most_columns);
    const int64_t rows = std::clamp<int64_t>(std::min(pairs / (n * columns), resident ? L : token_rows - columns), 1,
                                             std::min(quarter, columns));
    const at::Tensor buffer = empty<Real>({n * (resident ? L : columns + rows) * width});
    const at::Tensor products = empty<Real>({n * rows * columns});
    const at::Tensor wide = empty<Real>({kByDistance && weights_wanted ? n * std::max(rows, columns) * width : 0});

    for (int64_t b = 0; b < B; b += n) {
      const int64_t g = std::min(n, B - b);
      const auto fill = [&](int64_t offset, int64_t i, int64_t count) {  // (g, count, width) at an offset of the buffer
        const at::Tensor out = buffer.narrow(0, offset, g * count * width).view({g, count, width});
        launch(fill_rows<T, Real>, blocks_for(out.numel()), kThreads, 0, known, b, i, count, out.numel(), pointer<Real>(out));
        return out;
      };
      const at::Tensor all = resident ? fill(0, 0, L) : at::Tensor();
      // grad of the tokens from i on += w x, x of the other tokens; own: their x.
      const auto apply = [&](int64_t i, const at::Tensor& w, const at::Tensor& x, const at::Tensor& own, bool add) {
        const int64_t count = w.size(1);
        if constexpr (kByDistance) {
          const at::Tensor out = wide.narrow(0, 0, g * count * width).view({g, count, width});
          multiply(out, w, x, false);
          launch(add_differences<Real>, blocks_for(g * count * D), kThreads, 0, b, i, count, L, D, g * count * D,
                 static_cast<const Real*>(pointer<Real>(out)), static_cast<const Real*>(pointer<Real>(own)), own.stride(0),
                 pointer<float>(grad));
        } else {
          multiply(grad.narrow(0, b, g).narrow(1, i, count), w, x, add);
        }
      };
      for (int64_t i = 0; i < L; i += rows) {
        const int64_t m = std::min(rows, L - i);
        const at::Tensor here = resident ? all.narrow(1, i, m) : fill(0, i, m);
        for (int64_t j = i; j < L; j += columns) {
          const int64_t count = std::min(columns, L - j);
          const at::Tensor there = resident ? all.narrow(1, j, count) : fill(g * m * width, j, count);
          const at::Tensor s = products.narrow(0, 0, g * m * count).view({g, m, count});
          multiply(s, here.narrow(2, 0, D), there.narrow(2, 0, D).mT(), false);
          launch(weigh<Real, Pair>, blocks_for_warps(g * m), kThreads, 0, known, pair,
                 static_cast<const double*>(pointer<double>(shift)), b, i, j, m, count, g * m, weights_wanted,
                 pointer<Real>(s), pointer<double>(sums));
          if (!weights_wanted) continue;
          apply(i, s, there, here, i > 0 || j > i);
          const int64_t skip = j == i ? m : 0;  // the square of the rows themselves is done
          if (skip < count)
            apply(j + skip, s.narrow(2, skip, count - skip).mT(), here, there.narrow(1, skip, count - skip), i > 0);
        }
      }
    }
  }

  struct Tiling {
    bool possible, aligned;  // aligned: z can be read where it is
    int64_t n, rows;         // sequences at once, rows of tiles at once
    float scale;             // of the weights: keeps float16 from overflow
  };

  Tiling tiling() const {
    Tiling t{};
    if constexpr (!std::is_same_v<T, float> && !kByDistance) {
      // What is stored reaches up to 1 / (eps sin(smallest angle)). float16 has room for that, and for large norms and small
      // weights down from there, unless it is extreme.
      const double sine = std::sin(o.smallest_angle());
      const bool half = std::is_same_v<T, c10::Half>, in_range = !half || (o.eps * sine >= 1.0 / 1024 && o.eps <= 1);
      t.scale = static_cast<float>(sine * (half ? 16384 * o.eps : 1.0));
      t.aligned = z.stride(2) == 1 && D % 8 == 0 && z.stride(0) % 8 == 0 && z.stride(1) % 8 == 0 && z.stride(1) >= D &&
                  reinterpret_cast<uintptr_t>(z.const_data_ptr()) % 16 == 0;
      const int64_t tiles = divide_up(L, kTile), tile_bytes = kTile * kTile * sizeof(T);
      t.n = need_grad ? space.tile_weights / (tiles * tiles * tile_bytes) : B;
      t.rows = t.n > 0 ? tiles : space.tile_weights / (2 * tiles * tile_bytes);
      t.n = std::max<int64_t>(t.n, 1);
      if (!t.aligned) t.n = std::min(t.n, space.tile_tokens / (L * 8 * divide_up(D, 8) * static_cast<int64_t>(sizeof(T))));
      if (t.n > 0) t.n = divide_up(B, divide_up(B, t.n));  // groups of about the same size
      t.possible = !centre && in_range && t.n > 0 && t.rows > 0;
    }
    return t;
  }

  // Phases A and B by tiles, for 16-bit z. sums: (B, pairs of tiles).
  template <class Pair>
  void by_tiles(Pair pair, const Tiling& t, const at::Tensor& sums) {
    const bool weights_wanted = need_grad && !std::is_same_v<Pair, Largest>;
    const int64_t tiles = divide_up(L, kTile), size = kTile * kTile, padded = 8 * divide_up(D, 8);
    const at::Tensor weights =
        empty<T>({weights_wanted ? t.n * size * t.rows * (t.rows == tiles ? tiles : 2 * tiles) : 0});
    const at::Tensor copy = t.aligned ? at::Tensor() : at::zeros({t.n, L, padded}, options);
    for (int64_t b = 0; b < B; b += t.n) {
      const int64_t g = std::min(t.n, B - b);
      const at::Tensor part = z.narrow(0, b, g);
      if (!t.aligned) copy.narrow(0, 0, g).narrow(2, 0, D).copy_(part);
      const at::Tensor x = t.aligned ? part : copy.narrow(0, 0, g);
      Tokens<float> k = known;
      k.z = static_cast<const T*>(x.const_data_ptr()) - b * x.stride(0);  // the kernel adds b again
      k.C = x.size(2);
      for (int64_t d = 0; d < 3; ++d) k.stride[d] = x.stride(d);

      int64_t first_sum = 0;
      for (Strip strip{0, 0, tiles}; strip.I0 < tiles; strip.I0 = strip.I1) {
        strip.I1 = std::min(tiles, strip.I0 + t.rows);
        const int64_t height = (strip.I1 - strip.I0) * kTile, width = (tiles - strip.I0) * kTile;
        T* upper = weights_wanted ? pointer<T>(weights) : nullptr;
        T* lower = weights_wanted ? upper + g * height * width : nullptr;
        launch(weigh_tiles<T, Pair>, g * strip.size(), kThreads, kTileBytes, k, pair,
               static_cast<const double*>(pointer<double>(shift)), b, strip, t.scale, weights_wanted, upper, lower,
               pointer<double>(sums), sums.size(1), first_sum);
        first_sum += strip.size();
        if (!weights_wanted) continue;
        const int64_t i = strip.I0 * kTile, m = std::min(height, L - i), beyond = L - i - m;
        const at::Tensor values = x.narrow(2, 0, D);
        const at::Tensor w = weights.narrow(0, 0, g * height * width).view({g, height, width});
        multiply(grad.narrow(0, b, g).narrow(1, i, m), w.narrow(1, 0, m).narrow(2, 0, L - i), values.narrow(1, i, L - i),
                 i > 0);
        if (beyond == 0) continue;
        const at::Tensor v = weights.narrow(0, g * height * width, g * (width - height) * height);
        multiply(grad.narrow(0, b, g).narrow(1, i + m, beyond),
                 v.view({g, width - height, height}).narrow(1, 0, beyond).narrow(2, 0, m), values.narrow(1, i, m), i > 0);
      }
    }
  }

  at::Tensor run() {
    const Tiling t = tiling();
    const int64_t tiles = divide_up(L, kTile), slots = t.possible ? block_pairs(tiles) : L;
    const auto zeros = [&](double value) { return at::full({B, slots}, value, options.dtype(at::kDouble)); };
    const auto pass = [&](auto pair, const at::Tensor& sums) {
      if constexpr (!std::is_same_v<T, float> && !kByDistance && !std::is_same_v<decltype(pair), Decorrelation>) {
        if (t.possible) return by_tiles(pair, t, sums);
      }
      by_blocks(pair, sums);
    };
    measure_tokens();
    if constexpr (!kByDistance)
      if (o.shift_must_be_found()) {
        const at::Tensor most = zeros(-2);
        pass(Largest{}, most);
        launch(find_shift, B, kThreads, 0, static_cast<const double*>(pointer<double>(most)), slots, o.clamp,
               pointer<double>(shift));
      }
    const at::Tensor sums = zeros(0), losses = empty<double>({B}), scales = empty<float>({B});
    if (need_grad && kByDistance) grad.zero_();
    with_pair([&](auto pair) { pass(pair, sums); });
    launch(finish_sequence<Real>, B, kThreads, 0, known, o.variant, o.tau, static_cast<const double*>(pointer<double>(sums)),
           slots, static_cast<const double*>(pointer<double>(shift)), static_cast<double>(B), pointer<double>(losses),
           pointer<float>(scales));
    const float* factors = pointer<float>(scales);
    if (need_grad) {
      if constexpr (kByDistance)
        launch(finish_distances<T>, blocks_for(B * L * D), kThreads, 0, known, B * L * D, factors,
               static_cast<float>(0.2 / static_cast<double>(B * L * D)), pointer<float>(grad));
      else
        launch(finish_tokens<T>, blocks_for_warps(B * L), kThreads, 0, known, B * L, factors,
               t.possible ? 1 / t.scale : 1.0f, centre, pointer<float>(grad));
    }
    return losses.mean().to(at::kFloat);
  }
};

std::tuple<at::Tensor, at::Tensor> dispersion_in(const at::Tensor& z, c10::string_view variant, double tau, double clamp,
                                                 double eps, bool need_grad, const Workspace& space) {
  const Options options = checked_options(z, variant, tau, clamp, eps);
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor grad = at::empty(need_grad ? z.sizes() : at::IntArrayRef({0}), z.options().dtype(at::kFloat));
  const auto run = [&](auto type) {
    using T = decltype(type);
    if (options.variant == Variant::l2_repel) return Call<T, double>{z, options, need_grad, space, grad}.run();
    return Call<T, float>{z, options, need_grad, space, grad}.run();
  };
  at::Tensor loss;
  if (z.scalar_type() == at::kFloat) loss = run(float());
  else if (z.scalar_type() == at::kBFloat16) loss = run(c10::BFloat16());
  else loss = run(c10::Half());
  return {loss, grad};
}

#if defined(__CUDACC__)
std::tuple<at::Tensor, at::Tensor> dispersion(const at::Tensor& z, c10::string_view variant, double tau, double clamp,
                                              double eps, bool need_grad) {
  const c10::cuda::CUDAGuard guard(z.device());
  return dispersion_in(z, variant, tau, clamp, eps, need_grad, Workspace());
}
#endif

}  // namespace
}  // namespace minidisp

#if defined(__CUDACC__)
TORCH_LIBRARY_IMPL(minidisp, CUDA, m) { m.impl("dispersion", minidisp::dispersion); }
#endif
