// Kernels over pairs of tiles I <= J: W from tensor-core products of float16 unit vectors; l2_repel's W, and W times
// differences, in float32.

#pragma once

namespace minidisp::cuda {
namespace {

// Rows I0 <= I < I1 of tiles with all tiles J >= I, numbered: first the pairs inside the square, then those beyond it.
//
// W of a strip is stored in two pieces: upper, (sequences, rows of the strip, rows from the strip on), and, mirrored,
// lower, (sequences, rows beyond the strip, rows of the strip). In tiles, they are height() x width() and (width() -
// height()) x height().
struct Strip {
  int64_t I0, I1, tiles;
  MINIDISP_BOTH int64_t height() const { return I1 - I0; }
  MINIDISP_BOTH int64_t width() const { return tiles - I0; }
  MINIDISP_BOTH int64_t square() const { return block_pairs(height()); }
  MINIDISP_BOTH int64_t size() const { return square() + height() * (tiles - I1); }
  MINIDISP_BOTH int64_t stored() const { return height() * (width() + tiles - I1); }  // tiles of upper and lower
  MINIDISP_BOTH void find(int64_t number, int64_t* I, int64_t* J) const {
    if (number < square()) {
      block_pair(number, I, J);
      *I += I0, *J += I0;
    } else {
      *I = I0 + (number - square()) % height();
      *J = I1 + (number - square()) / height();
    }
  }
};

// The position of tile (I, J), or (J, I) for a column J of the strip, in upper or lower, and the stride of its rows.
template <class T>
struct Place {
  T* tile;
  int64_t stride;
};
template <int kTile, class T>
__device__ __forceinline__ Place<T> place(const Strip& strip, T* upper, T* lower, int64_t sequence, int64_t I,
                                          int64_t J) {
  const int64_t height = strip.height() * kTile, width = strip.width() * kTile;
  if (I < strip.I1)
    return {upper + sequence * height * width + ((I - strip.I0) * width + (J - strip.I0)) * kTile, width};
  return {lower + sequence * (width - height) * height + ((I - strip.I1) * height + (J - strip.I0)) * kTile, height};
}

// The index of a tile in the row sums of W per tile, (sequences, stored tiles, kTile): the tiles of upper, then those
// of lower, both row by row.
__device__ __forceinline__ int64_t degree_slot(const Strip& strip, int64_t I, int64_t J) {
  if (I < strip.I1) return (I - strip.I0) * strip.width() + J - strip.I0;
  return strip.height() * strip.width() + (I - strip.I1) * strip.height() + J - strip.I0;
}

// The tensor-core kernel: one block per pair of tiles.
constexpr int kTile = 128;
constexpr int kDepth = 32;  // features per stage
constexpr int kStages = 4;
constexpr int kStageBytes = 2 * kTile * kDepth * 2;
constexpr int kStagedStride = kTile + 8;  // numbers; the extra 16 bytes keep the rows of a tile in different banks
constexpr int kTileBytes = std::max(kStages * kStageBytes, 2 * kTile * kStagedStride * 2);

// The offset of a chunk (16 bytes, 8 features) of a row in a stage, permuted so that 8 rows of a matrix use all banks.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kDepth * 2 + (chunk ^ (row / 2 % 4)) * 16;
}

struct alignas(4) HalfPair {
  __half x[2];
};

// Writes W_ij scale inverse_j to upper and, mirrored, W_ij scale inverse_i to upper or lower, so that their products
// with x are those of W scale with u'; and the sums of the rows of W scale to degrees. The sum of the tile's values
// goes to sums[sequence][number of the tile]. Unless need_grad, sums only.
template <class Pair>
__global__ void __launch_bounds__(kThreads, 2)
    weigh_tiles(Centred k, Pair pair, Strip strip, float scale, bool need_grad, __half* upper, __half* lower,
                float* degrees, double* sums, int64_t sums_stride) {
  __shared__ float inverses[2][kTile], offsets[2][kTile];  // of the rows, of the columns
  __shared__ float row_sums[4][kTile], column_sums[2][kTile];
  __shared__ double warp_sums[kWarps];
  char* const memory = shared_memory();
  const int thread = static_cast<int>(threadIdx.x);
  const int sequence = static_cast<int>(blockIdx.x / strip.size());  // 32 bits where sufficient, to save registers
  int64_t I64, J64;
  strip.find(blockIdx.x % strip.size(), &I64, &J64);
  const int I = static_cast<int>(I64), J = static_cast<int>(J64);

  const auto tokens_in = [&](int tile) {
    const int64_t left = k.T - static_cast<int64_t>(tile) * kTile;
    return left < kTile ? static_cast<int>(left) : kTile;
  };

  const int64_t own = static_cast<int64_t>(thread < kTile ? I : J) * kTile + thread % kTile;
  inverses[thread / kTile][thread % kTile] = own < k.T ? k.inverse[sequence * k.T + own] : 0.0f;
  offsets[thread / kTile][thread % kTile] = own < k.T ? k.offset[sequence * k.T + own] : 0.0f;

  // A stage is 2 x 128 rows of 4 chunks: a thread copies 4 of them, always the same chunk of rows 64 apart.
  const int width = static_cast<int>(k.width), own_row = thread / 4, chunk = thread % 4;
  const auto row_of = [&](int tile) {
    const int64_t i = static_cast<int64_t>(tile) * kTile + own_row;
    return k.x + (sequence * k.T + i) * k.width + chunk * 8;
  };
  const __half *row_source = row_of(I), *column_source = row_of(J);
  // The first of the two rows exists if this is more than 0, the second if it is more than 64.
  const int rows_here = tokens_in(I) - own_row, columns_here = tokens_in(J) - own_row;
  const auto fetch = [&](int step) {
    char* stage = memory + step % kStages * kStageBytes;
    const int d = step * kDepth;
    const bool inside = d + chunk * 8 < width;  // width is a multiple of 8
    for (int q = 0; q < 4; ++q) {
      const __half* source = (q < 2 ? row_source : column_source) + q % 2 * 64 * k.width + d;
      const bool wanted = inside && (q < 2 ? rows_here : columns_here) > q % 2 * 64;
      char* to = stage + q / 2 * (kStageBytes / 2) + chunk_offset(q % 2 * 64 + own_row, chunk);
      copy_async(to, wanted ? source : k.x, wanted);
    }
  };

  // A warp's part of the tile is 64 x 32: 4 x 4 products of 16 x 8.
  const int top = warp() / 4 * 64, left = warp() % 4 * 32;
  float s[4][4][4] = {};
  const int steps = (width + kDepth - 1) / kDepth;
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    copy_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this stage has arrived, and all have finished with the one to be overwritten next
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
        load_matrices(
            c[n], columns + chunk_offset(left + n * 16 + lane() / 16 * 8 + lane() % 8, half * 2 + lane() / 8 % 2));
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_add(s[m][n], a[m], c[n / 2] + n % 2 * 2);
    }
  }
  copy_wait<0>();
  __syncthreads();  // the stages are free

  // s[m][n][2 h + e] is the product of row top + 16 m + 8 h + lane / 4 and column left + 8 n + 2 (lane % 4) + e.
  __half* const direct = reinterpret_cast<__half*>(memory);
  __half* const mirrored = direct + kTile * kStagedStride;
  const bool diagonal = I == J;
  const int rows_real = tokens_in(I), columns_real = tokens_in(J);
  float values = 0;
  const auto weigh = [&](auto interior) {  // interior: every pair is real, and none is of a token with itself
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = top + m * 16 + h * 8 + lane() / 4;
        const float inverse = inverses[0][row], offset = offsets[0][row];
        const int itself = diagonal ? row : -1, last = row < rows_real ? columns_real : 0;
        float value_sum = 0, row_sum = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          HalfPair both;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = left + n * 8 + lane() % 4 * 2 + e;
            float value, weight;
            pair(s[m][n][h * 2 + e] * (inverse * inverses[1][column]) + (offset + offsets[1][column]), &value, &weight);
            weight *= scale;
            if constexpr (!interior.value) {
              value = column > itself && column < last ? value : 0.0f;
              weight = column != itself && column < last ? weight : 0.0f;
            }
            value_sum += value;
            row_sum += weight;
            s[m][n][h * 2 + e] = weight;
            both.x[e] = static_cast<__half>(weight * inverses[1][column]);
            mirrored[column * kStagedStride + row] = static_cast<__half>(weight * inverse);
          }
          *reinterpret_cast<HalfPair*>(direct + row * kStagedStride + left + n * 8 + lane() % 4 * 2) = both;
        }
        values += value_sum;
        for (int mask = 1; mask < 4; mask *= 2) row_sum += shuffle_xor(row_sum, mask);
        if (lane() % 4 == 0) row_sums[warp() % 4][row] = row_sum;
      }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float column_sum = 0;
#pragma unroll
        for (int m = 0; m < 4; ++m) column_sum += s[m][n][e] + s[m][n][2 + e];
        for (int mask = 4; mask < 32; mask *= 2) column_sum += shuffle_xor(column_sum, mask);
        if (lane() < 4) column_sums[warp() / 4][left + n * 8 + lane() * 2 + e] = column_sum;
      }
  };
  if (diagonal || rows_real < kTile || columns_real < kTile) weigh(std::false_type());
  else weigh(std::true_type());
  double sum = warp_sum(values);
  if (lane() == 0) warp_sums[warp()] = sum;
  __syncthreads();
  if (thread == 0) {
    for (int w = 1; w < kWarps; ++w) sum += warp_sums[w];
    sums[sequence * sums_stride + blockIdx.x % strip.size()] = sum;
  }
  if (!need_grad) return;

  // The staged tiles are written in rows of 256 bytes, 16 threads each; a tile on the diagonal needs direct only.
  const auto store = [&](const __half* tile, const Place<__half>& to) {
    for (int row = thread / 16; row < kTile; row += kThreads / 16)
      *reinterpret_cast<Packet<__half>*>(to.tile + row * to.stride + thread % 16 * 8) =
          *reinterpret_cast<const Packet<__half>*>(tile + row * kStagedStride + thread % 16 * 8);
  };
  degrees += sequence * strip.stored() * kTile;
  const int row = thread % kTile;
  if (thread < kTile) {
    degrees[degree_slot(strip, I, J) * kTile + row] =
        (row_sums[0][row] + row_sums[1][row]) + (row_sums[2][row] + row_sums[3][row]);
  } else if (!diagonal) {
    degrees[degree_slot(strip, J, I) * kTile + row] = column_sums[0][row] + column_sums[1][row];
  }
  store(direct, place<kTile>(strip, upper, lower, sequence, I, J));
  if (!diagonal) store(mirrored, place<kTile>(strip, upper, lower, sequence, J, I));
}

// Adds the row sums of the strip's tiles to the degree of the tokens from the strip on; the first strip sets it.
// elements: tokens of all sequences; T: tokens per sequence.
__global__ void add_degrees(Strip strip, int64_t T, int64_t elements, const float* degrees, float* degree) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= elements) return;
  const int64_t rows = T - strip.I0 * kTile, sequence = n / rows, row = n % rows, I = strip.I0 + row / kTile;
  const int64_t slots = I < strip.I1 ? strip.width() : strip.height();
  degrees += (sequence * strip.stored() + degree_slot(strip, I, strip.I0)) * kTile + row % kTile;
  float sum = 0;
  for (int64_t slot = 0; slot < slots; ++slot) sum += degrees[slot * kTile];
  float& own = degree[sequence * T + strip.I0 * kTile + row];
  own = strip.I0 > 0 ? own + sum : sum;
}

// l2_repel. A squared distance is a sum of squared differences, which avoids cancellation, no matter how far the tokens
// are from the origin; a difference of float32 numbers is exact to half a unit in its last place. So float32 suffices.
constexpr int kSmallTile = 64;
constexpr int kSmallDepth = 32;  // features, or tokens, at a time

// exp(-||z_i - z_j||^2 / tau), a block per pair of tiles: W to upper and, mirrored, to upper or lower, the sum of the
// pairs i < j to sums[sequence][number of the tile]. b0: the first sequence.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weigh_distances(Tokens k, int64_t b0, double inverse_tau, Strip strip, bool need_grad, float* upper, float* lower,
                    double* sums, int64_t sums_stride) {
  __shared__ float tokens[2][kSmallDepth][kSmallTile + 1];  // of the rows, of the columns; then the mirrored tile
  __shared__ double warp_sums[kWarps];
  const int thread = static_cast<int>(threadIdx.x), y = thread / 16, x = thread % 16;
  const int64_t sequence = blockIdx.x / strip.size(), number = blockIdx.x % strip.size();
  int64_t I, J;
  strip.find(number, &I, &J);

  // The thread's pairs are rows y + 16 r and columns x + 16 c. Sums of 8 squares are added with compensated summation:
  // rest collects the rounding errors.
  float distance[4][4] = {}, rest[4][4] = {};
  for (int64_t d0 = 0; d0 < k.C; d0 += kSmallDepth) {
    __syncthreads();  // all have finished with the previous features
    for (int side = 0; side < 2; ++side)
      for (int r = warp(); r < kSmallTile; r += kWarps) {
        const int64_t i = (side == 0 ? I : J) * kSmallTile + r, d = d0 + lane();
        tokens[side][lane()][r] =
            i < k.T && d < k.C ? static_cast<float>(token<T>(k, b0 + sequence, i)[d * k.stride[2]]) : 0.0f;
      }
    __syncthreads();
    for (int d = 0; d < kSmallDepth; d += 8) {
      float squares[4][4] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float a[4], b[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) a[q] = tokens[0][d + e][y + 16 * q], b[q] = tokens[1][d + e][x + 16 * q];
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) squares[r][c] += (a[r] - b[c]) * (a[r] - b[c]);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float larger = distance[r][c] + squares[r][c];
          rest[r][c] += squares[r][c] - (larger - distance[r][c]);
          distance[r][c] = larger;
        }
    }
  }

  __syncthreads();  // the tokens are no longer needed
  float(*const mirrored)[kSmallTile + 1] = tokens[0];
  const Place<float> direct = place<kSmallTile>(strip, upper, lower, sequence, I, J);
  const bool diagonal = I == J;
  double sum = 0;
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) {
      const int row = y + 16 * r, column = x + 16 * c;
      const int64_t i = I * kSmallTile + row, j = J * kSmallTile + column;
      const double squared = static_cast<double>(distance[r][c]) + static_cast<double>(rest[r][c]);
      const bool real = i < k.T && j < k.T && i != j;
      const float weight = real ? expf(static_cast<float>(fmax(-squared * inverse_tau, -100.0))) : 0.0f;
      if (i < j) sum += weight;
      if (!need_grad) continue;
      direct.tile[row * direct.stride + column] = weight;
      mirrored[column][row] = weight;
    }
  sum = warp_sum(sum);
  if (lane() == 0) warp_sums[warp()] = sum;
  __syncthreads();
  if (thread == 0) {
    for (int w = 1; w < kWarps; ++w) sum += warp_sums[w];
    sums[sequence * sums_stride + number] = sum;
  }
  if (!need_grad || diagonal) return;
  const Place<float> to = place<kSmallTile>(strip, upper, lower, sequence, J, I);
  for (int n = thread; n < kSmallTile * kSmallTile; n += kThreads)
    to.tile[n / kSmallTile * to.stride + n % kSmallTile] = mirrored[n / kSmallTile][n % kSmallTile];
}

// product of the tokens from i0 on (+)= sum over the tokens from j0 on of W_ij (z_j - z_i), one block per 64 tokens and
// 64 features. w: (sequences, at least rows, stride); its first count columns are used; sequence_stride between
// sequences. b0: the first sequence.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_differences(Tokens k, int64_t b0, int64_t i0, int64_t rows, int64_t j0, int64_t count, bool add, const float* w,
                    int64_t stride, int64_t sequence_stride, float* product) {
  __shared__ float weights[kSmallDepth][kSmallTile + 1], others[kSmallDepth][kSmallTile + 1];
  const int thread = static_cast<int>(threadIdx.x), y = thread / 16, x = thread % 16;
  const int64_t wide = (k.C + kSmallTile - 1) / kSmallTile, high = (rows + kSmallTile - 1) / kSmallTile;
  const int64_t sequence = blockIdx.x / (wide * high), top = blockIdx.x / wide % high * kSmallTile;
  const int64_t left = blockIdx.x % wide * kSmallTile, b = b0 + sequence;
  const auto read = [&](int64_t i, int64_t d) { return static_cast<float>(token<T>(k, b, i)[d * k.stride[2]]); };
  w += sequence * sequence_stride + top * stride;

  // The thread's elements are tokens y + 16 r and features x + 16 c.
  float own[4][4], total[4][4] = {};
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) {
      const int64_t i = top + y + 16 * r, d = left + x + 16 * c;
      own[r][c] = i < rows && d < k.C ? read(i0 + i, d) : 0.0f;
    }
  for (int64_t j = 0; j < count; j += kSmallDepth) {
    __syncthreads();  // all have finished with the previous tokens
    for (int r = warp(); r < kSmallTile; r += kWarps)
      weights[lane()][r] = top + r < rows && j + lane() < count ? w[r * stride + j + lane()] : 0.0f;
    for (int n = thread; n < kSmallDepth * kSmallTile; n += kThreads) {
      const int64_t other = j + n / kSmallTile, d = left + n % kSmallTile;
      others[n / kSmallTile][n % kSmallTile] = other < count && d < k.C ? read(j0 + other, d) : 0.0f;
    }
    __syncthreads();
    float part[4][4] = {};
#pragma unroll 8
    for (int q = 0; q < kSmallDepth; ++q) {
      float a[4], z[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = weights[q][y + 16 * e], z[e] = others[q][x + 16 * e];
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) part[r][c] += a[r] * (z[c] - own[r][c]);
    }
    for (int r = 0; r < 4; ++r)
      for (int c = 0; c < 4; ++c) total[r][c] += part[r][c];
  }
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) {
      const int64_t i = top + y + 16 * r, d = left + x + 16 * c;
      if (i >= rows || d >= k.C) continue;
      float& out = product[(b * k.T + i0 + i) * k.C + d];
      out = add ? out + total[r][c] : total[r][c];
    }
}

}  // namespace
}  // namespace minidisp::cuda
