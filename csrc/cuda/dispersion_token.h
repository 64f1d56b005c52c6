// Kernels over tokens: norms, the mean unit vector, centred float16 copies; and, in backward, backpropagation from the
// unit vectors to z. One warp per token; a lane takes 8 features at a time.

#pragma once

#include "block.h"

namespace minidisp::cuda {
namespace {

constexpr int kRows = 64;  // tokens per block in measure

// z and the state for backward. The unit vector of token n of the batch is u = (z - mean) / length = u' + centre, with
// the centre of its sequence.
struct Tokens {
  const void* z;
  int64_t stride[3], T, C;
  bool packed;  // rows of z are read, and those of the gradient written, 16 bytes at a time
  float* centre;  // (B, C): the mean of u over the sequence, or zeros
  float *mean, *norm, *length;  // (B, T): mean over the features (decorrelation, else 0), norm of z - mean, norm + eps.
                                // length is NaN for a token with NaN or Inf, and Inf for one without direction
  float* degree;  // (B, T): sum of the weights of the token's pairs, or zeros
  float* scale;  // (B): the factor between W U and the gradient
};

template <class T>
__device__ __forceinline__ const T* token(const Tokens& k, int64_t b, int64_t i) {
  return static_cast<const T*>(k.z) + b * k.stride[0] + i * k.stride[1];
}

// Mean, norm and length of the tokens of the sequences from b0 on, with `chunks` blocks of kRows tokens per sequence;
// unless sums is null, also the sum of each block's unit vectors, sums (blocks, C).
template <class T>
__global__ void measure(Tokens k, int64_t b0, int chunks, bool centring, double eps, float* sums) {
  __shared__ float means[kRows], inverses[kRows];
  const int64_t b = b0 + blockIdx.x / chunks, first = static_cast<int64_t>(blockIdx.x % chunks) * kRows;
  const int rows = static_cast<int>(k.T - first < kRows ? k.T - first : kRows);
  for (int r = warp(); r < rows; r += kWarps) {
    const T* z = token<T>(k, b, first + r);
    float x[8], sum = 0, most = 0, squares = 0, rest = 0, bad = 0;
    if (centring)
      for (int64_t d = lane() * 8; d < k.C; d += 256) {
        read8(z, k.stride[2], d, k.C, k.packed, x);
        for (int e = 0; e < 8; ++e) {
          sum += x[e];
          most = fmaxf(most, fabsf(x[e]));
        }
      }
    const float mean = centring ? static_cast<float>(warp_sum(sum) / static_cast<double>(k.C)) : 0.0f;
    for (int64_t d = lane() * 8; d < k.C; d += 256) {
      read8(z, k.stride[2], d, k.C, k.packed, x);
      for (int e = 0; e < 8; ++e) {
        const float centred = d + e < k.C ? x[e] - mean : 0.0f;
        bad += x[e] * 0.0f;
        squares += centred * centred;
        rest = fmaxf(rest, fabsf(centred));
      }
    }
    float norm = sqrtf(static_cast<float>(warp_sum(squares)));
    const bool poisoned = !(warp_sum(bad) == 0) || isinf(norm);
    // A constant token: only rounding errors are left after centring.
    if (centring && warp_max(rest) <= 4 * 1.1920929e-7 * warp_max(most)) norm = 0;
    float length = static_cast<float>(static_cast<double>(norm) + eps);
    if (length == 0) length = INFINITY;
    if (poisoned) length = NAN;
    if (lane() == 0) {
      const int64_t n = b * k.T + first + r;
      k.mean[n] = means[r] = mean;
      k.norm[n] = norm;
      k.length[n] = length;
      inverses[r] = 1 / length;
    }
  }
  if (sums == nullptr) return;
  __syncthreads();
  for (int64_t d = threadIdx.x; d < k.C; d += kThreads) {
    const T* z = token<T>(k, b, first) + d * k.stride[2];
    float sum = 0;
    for (int r = 0; r < rows; ++r) sum += (static_cast<float>(z[r * k.stride[1]]) - means[r]) * inverses[r];
    sums[static_cast<int64_t>(blockIdx.x) * k.C + d] = sum;
  }
}

// One block per sequence from b0 on: its centre, from the sums of measure, and half the centre's square.
__global__ void find_centre(Tokens k, int64_t b0, int chunks, const float* sums, float* half_square) {
  __shared__ double shared[kWarps];
  const int64_t s = blockIdx.x;
  double square = 0;
  for (int64_t d = threadIdx.x; d < k.C; d += kThreads) {
    float sum = 0;
    for (int c = 0; c < chunks; ++c) sum += sums[(s * chunks + c) * k.C + d];
    const float m = sum / static_cast<float>(k.T);
    k.centre[(b0 + s) * k.C + d] = m;
    square += m * m;
  }
  square = block_reduce<false>(square, shared);
  if (threadIdx.x == 0) half_square[s] = static_cast<float>(square / 2);
}

// Tokens of n sequences in the format for the tensor cores: x = u' / inverse in float16, padded with zeros; inverse is
// a power of two that brings the largest feature between 1 and 2. u_i.u_j = x_i.x_j inverse_i inverse_j + offset_i +
// offset_j.
struct Centred {
  __half* x;  // (n, T, width)
  float *inverse, *offset;  // (n, T)
  int64_t T, width;
};

// tokens: the total number in the sequences from b0 on.
template <class T>
__global__ void centre_tokens(Tokens k, int64_t b0, int64_t tokens, const float* half_square, Centred to) {
  const int64_t n = global_warp();
  if (n >= tokens) return;
  const int64_t s = n / k.T, row = (b0 + s) * k.T + n % k.T;
  const T* z = token<T>(k, b0 + s, n % k.T);
  const float* centre = k.centre + (b0 + s) * k.C;
  const float mean = k.mean[row], factor = 1 / k.length[row];
  const auto read = [&](int64_t d, float(&x)[8], float(&m)[8]) {
    read8(z, k.stride[2], d, k.C, k.packed, x);
    read8(centre, 1, d, k.C, k.packed, m);
    for (int e = 0; e < 8; ++e) x[e] = d + e < k.C ? (x[e] - mean) * factor - m[e] : 0.0f;
  };
  float x[8], m[8], most = 0, dot = 0;
  for (int64_t d = lane() * 8; d < k.C; d += 256) {
    read(d, x, m);
    for (int e = 0; e < 8; ++e) {
      most = fmaxf(most, fabsf(x[e]));
      dot += x[e] * m[e];
    }
  }
  most = static_cast<float>(warp_max(most));
  const double offset = warp_sum(dot) + half_square[s];
  int exponent = most > 0 ? -ilogbf(most) : 0;
  if (exponent > 40) exponent = 40;  // beyond this, tokens are equal
  const float larger = ldexpf(1.0f, exponent);
  for (int64_t d = lane() * 8; d < to.width; d += 256) {
    read(d, x, m);
    for (int e = 0; e < 8; ++e) x[e] *= larger;
    write8(to.x + n * to.width, d, to.width, true, x);
  }
  if (lane() == 0) {
    to.inverse[n] = ldexpf(1.0f, -exponent);
    to.offset[n] = static_cast<float>(offset);
  }
}

// One block per sequence: its smallest angle, from the largest cosine of each token.
__global__ void find_shift(const double* most, int64_t slots, double clamp, double* shift) {
  __shared__ double shared[kWarps];
  double c = -2;
  for (int64_t i = threadIdx.x; i < slots; i += kThreads) c = fmax(c, most[blockIdx.x * slots + i]);
  c = block_reduce<true>(c, shared);
  if (threadIdx.x == 0) shift[blockIdx.x] = acos(fmin(fmax(c, clamp - 1), 1 - clamp));
}

// One block per sequence: its loss, and the factor between W U and the gradient. sums are over the pairs i < j; W is
// stored times weight_scale.
__global__ void finish_sequence(Tokens k, Variant variant, double tau, double weight_scale, const double* sums,
                                int64_t slots, const double* shift, double batch, double* loss) {
  __shared__ double pair_sums[kWarps], token_sums[kWarps];
  const int64_t b = blockIdx.x;
  const bool by_distance = variant == Variant::l2_repel;
  double sum = 0, own = 0;  // own: NaN if a token is; squares of z for l2_repel
  for (int64_t i = threadIdx.x; i < slots; i += kThreads) sum += sums[b * slots + i];
  for (int64_t i = threadIdx.x; i < k.T; i += kThreads) {
    const double norm = k.norm[b * k.T + i], length = k.length[b * k.T + i];
    own += isnan(length) ? length : by_distance ? norm * norm : 0.0;
  }
  sum = block_reduce<false>(sum, pair_sums);
  own = block_reduce<false>(own, token_sums);
  if (threadIdx.x != 0) return;
  const double tokens = static_cast<double>(k.T), pairs = tokens * (tokens - 1);
  double value, factor;
  if (variant == Variant::angular_spread) {
    value = log(2 * sum / pairs) - shift[b] / (kPi * tau);
    factor = 1 / (kPi * tau * sum);
  } else if (by_distance) {
    value = log((2 * sum + tokens) / (tokens * tokens)) + 0.1 * own / (tokens * static_cast<double>(k.C));
    factor = 4 / (tau * (2 * sum + tokens));
  } else {
    value = 2 * sum / pairs;
    factor = variant == Variant::orthogonalization ? 4 / (kPi * pairs) : 4 / pairs;
  }
  loss[b] = value + own * 0;
  k.scale[b] = static_cast<float>((factor + own * 0) / (batch * weight_scale));
}

// The gradient of a token, computed by a warp from product = W U': W U = W U' + degree centre, backpropagated through
// the division by length and the centring, times upstream; in the type of z.
template <class T>
__global__ void finish_tokens(Tokens k, int64_t tokens, bool centring, const float* upstream, const float* product,
                              T* grad) {
  const int64_t n = global_warp();
  if (n >= tokens) return;
  const int64_t b = n / k.T;
  const T* z = token<T>(k, b, n % k.T);
  const float* centre = k.centre + b * k.C;
  const float mean = k.mean[n], norm = k.norm[n], inverse = 1 / k.length[n], degree = k.degree[n];
  const float scale = k.scale[b] * *upstream;
  const auto read = [&](int64_t d, float(&u)[8], float(&g)[8]) {
    float m[8];
    read8(z, k.stride[2], d, k.C, k.packed, u);
    read8(product + n * k.C, 1, d, k.C, k.packed, g);
    read8(centre, 1, d, k.C, k.packed, m);
    for (int e = 0; e < 8; ++e) {
      u[e] = d + e < k.C ? (u[e] - mean) * inverse : 0.0f;
      g[e] = (g[e] + degree * m[e]) * scale;
    }
  };
  float u[8], g[8], dot = 0, g_sum = 0, u_sum = 0;
  for (int64_t d = lane() * 8; d < k.C; d += 256) {
    read(d, u, g);
    for (int e = 0; e < 8; ++e) {
      dot += g[e] * u[e];
      g_sum += g[e];
      u_sum += u[e];
    }
  }
  const double dots = warp_sum(dot), g_sums = centring ? warp_sum(g_sum) : 0, u_sums = centring ? warp_sum(u_sum) : 0;
  const float radial = norm == 0 ? 0.0f : static_cast<float>(dots / norm);
  const float shift =
      centring && norm != 0 ? static_cast<float>((g_sums * inverse - radial * u_sums) / static_cast<double>(k.C))
                            : 0.0f;
  for (int64_t d = lane() * 8; d < k.C; d += 256) {
    read(d, u, g);
    for (int e = 0; e < 8; ++e) g[e] = g[e] * inverse - u[e] * radial - shift;
    write8(grad + n * k.C, d, k.C, k.packed, g);
  }
}

// l2_repel: product holds sum_j W_ij (z_j - z_i); pull z is the gradient of 0.1 mean(z^2).
template <class T>
__global__ void finish_distances(Tokens k, int64_t tokens, float pull, const float* upstream, const float* product,
                                 T* grad) {
  const int64_t n = global_warp();
  if (n >= tokens) return;
  const float scale = k.scale[n / k.T];
  for (int64_t d = lane() * 8; d < k.C; d += 256) {
    float x[8], g[8];
    read8(token<T>(k, n / k.T, n % k.T), k.stride[2], d, k.C, k.packed, x);
    read8(product + n * k.C, 1, d, k.C, k.packed, g);
    for (int e = 0; e < 8; ++e) g[e] = (g[e] * scale + pull * x[e]) * *upstream;
    write8(grad + n * k.C, d, k.C, k.packed, g);
  }
}

}  // namespace
}  // namespace minidisp::cuda
