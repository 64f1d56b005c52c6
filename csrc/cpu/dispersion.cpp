// The dispersion loss and its gradient on the CPU, in one pass over the pairs of tokens.
//
// A sequence's loss is a sum over pairs of a function of S_ij = u_i.u_j with unit vectors u_i (l2_repel: of the
// distance). The tokens are divided into blocks of 128. For each pair of blocks I <= J:
//   S = U_I U_J^T             a tile of 128 x 128, multiplied in registers
//   W = weight of each pair   overwrites S, while the values are summed
//   G_I += W U_J,  G_J += W^T U_I
// G, divided by the sum and backpropagated through the normalisation, is the gradient: 3 L^2 D multiply-adds, no L x L
// matrix. Every tile is summed from zero before it is added, as in a blocked product.
// Sequences are parallelised over the threads. The remaining ones are shared by teams of threads, all at the same time,
// one pair of blocks after another: two threads have a G each; more than two share one G, and process the pairs in
// rounds in which no block occurs twice. So every sum has a fixed order, and the result depends only on the number of
// threads. l2_repel is computed in double, on copies of small parts of z, since differences of nearly equal tokens
// cancel. angular_spread may use AMX tiles (dispersion_amx.cpp) instead: the same phases, with blocks of 256 tokens.
// Memory beyond the gradient: U and at most two G, 3 L D floats, for each sequence in progress (l2_repel: G in double,
// no U; with AMX tiles, half as much again), and half a megabyte of tiles per thread.

#include "dispersion.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "dispersion_amx.h"
#include "host.h"
#include "numbers.h"

namespace minidisp {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kTileStride = kBlock + 16;  // no power of two, which would cause cache conflicts between rows
constexpr int64_t kDepth = 256;               // of the partial products that are summed to S
constexpr int64_t kWideDepth = 128;           // the same in double
constexpr int64_t kTileBlock = 256;           // with AMX tiles
constexpr int64_t kPad = 16;                  // floats in the longest vector

// The vector code for one instruction set.
struct Kernels {
  template <class T>
  using MultiplyOf = void (*)(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t, bool, bool);
  using Multiply = MultiplyOf<float>;
  using WideMultiply = MultiplyOf<double>;
  Multiply multiply, multiply_transposed;
  WideMultiply wide_multiply, wide_multiply_transposed;
  void (*transpose)(const float*, int64_t, int64_t, int64_t, float*, int64_t);
  void (*wide_transpose)(const double*, int64_t, int64_t, int64_t, double*, int64_t);
  double (*weigh_cosines)(const Options&, double, float*, int64_t, int64_t, int64_t, bool, bool);
  double (*weigh_distances)(double, const double*, const double*, double*, int64_t, int64_t, int64_t, bool, bool);
  float (*largest)(const float*, int64_t, int64_t, int64_t, bool);
  float (*unit_row)(const Options&, const float*, float*, int64_t, float*, float*);
  void (*gradient_row)(const Options&, float* const*, int, const float*, float, const float*, int64_t, float, float,
                       float, float*);
};

#define MINIDISP_TILE "dispersion_tile.h"
#include "instruction_sets.h"

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// n features of a token, from feature d on, as float or double.
template <class From, class To>
void read_as(const void* z, int64_t offset, int64_t stride, int64_t n, To* out) {
  const From* p = static_cast<const From*>(z) + offset;
  if (stride == 1)
    for (int64_t d = 0; d < n; ++d) out[d] = static_cast<To>(static_cast<float>(p[d]));
  else
    for (int64_t d = 0; d < n; ++d) out[d] = static_cast<To>(static_cast<float>(p[d * stride]));
}

template <class To>
void read_token(const TokenVectors& z, int64_t b, int64_t i, int64_t d, int64_t n, To* out) {
  const int64_t offset = b * z.stride[0] + i * z.stride[1] + d * z.stride[2];
  if (z.type == Type::float32) read_as<float>(z.data, offset, z.stride[2], n, out);
  else if (z.type == Type::bfloat16) read_as<BFloat16>(z.data, offset, z.stride[2], n, out);
  else read_as<Half>(z.data, offset, z.stride[2], n, out);
}

// The buffers of a thread and its partial results.
struct Thread {
  float *tile, *panel;                                        // for cosines
  uint16_t* pair;                                             // for AMX tiles
  double *wide_tile, *wide_panel, *wide_rows, *wide_columns;  // for distances
  double sum, square_sum;
  float most, bad;
};

// A sequence in progress, processed by one or more threads.
constexpr int64_t kGradients = 2;
int64_t gradients(int64_t threads) { return threads <= kGradients ? threads : 1; }  // number of G

struct Sequence {
  float *u, *norm, *length, *g[kGradients];    // for cosines
  SpreadTiles tiles;                           // with AMX tiles, in addition
  float *u_mean, *base, centre;                // base - centre u_i: the contribution of the weights' centre to G_i
  double *mean, *square, *wide_g[kGradients];  // for distances
  double sum, square_sum, shift;
  bool bad;
};

// One call: the sizes, and the phases of the computation for a sequence.
struct Call {
  const TokenVectors& z;
  const Options o;
  const bool need_grad;
  float* const grad;
  const Kernels& k;
  const SpreadKernels* const spread;  // AMX tiles, if they are used
  const SpreadFit fit = spread != nullptr ? fit_spread(o, o.smallest_angle()) : SpreadFit{};
  const int64_t B = z.size[0], L = z.size[1], D = z.size[2];
  const bool by_distance = o.variant == Variant::l2_repel;
  const int64_t width = round_up(by_distance ? D + 1 : D, spread ? 32 : kPad);  // for distances, column D sums weights
  const int64_t stride = width % 64 == 0 ? width + kPad : width;
  const bool direct = z.type == Type::float32 && z.stride[2] == 1 && D % kPad == 0;  // rows of z can be read in place
  const int64_t rows = round_up(L, kTileTokens), matrix = (spread ? rows : L) * stride;

  int64_t thread_bytes() const {
    if (by_distance) return 8 * ((kBlock + kWideDepth) * kTileStride + 2 * kBlock * (kWideDepth + kPad));
    if (spread) return 2 * spread->memory(std::min(L, kTileBlock));
    return 4 * (kBlock + kDepth) * kTileStride;
  }

  int64_t sequence_bytes(int64_t gradients) const {
    if (!need_grad) gradients = 0;
    const int64_t tiles = spread ? 3 * 2 * rows * width + 4 * (rows + 2 * width) : 0;
    return by_distance ? 8 * (round_up(D, kPad) + rows + gradients * matrix)
                       : 4 * (2 * rows + (1 + gradients) * matrix) + tiles;
  }

  Thread thread_at(char* memory) const {
    Thread t{};
    if (by_distance) {
      double* p = reinterpret_cast<double*>(memory);
      t.wide_tile = std::exchange(p, p + kBlock * kTileStride);
      t.wide_panel = std::exchange(p, p + kWideDepth * kTileStride);
      t.wide_rows = std::exchange(p, p + kBlock * (kWideDepth + kPad));
      t.wide_columns = p;
    } else {
      t.pair = reinterpret_cast<uint16_t*>(memory);  // the two are never used together
      t.tile = reinterpret_cast<float*>(memory);
      t.panel = t.tile + kBlock * kTileStride;
    }
    return t;
  }

  Sequence sequence_at(char* memory, int64_t gradients) const {
    Sequence s{};
    if (!need_grad) gradients = 0;
    if (by_distance) {
      double* p = reinterpret_cast<double*>(memory);
      s.mean = std::exchange(p, p + round_up(D, kPad));
      s.square = std::exchange(p, p + rows);
      for (int64_t c = 0; c < gradients; ++c) s.wide_g[c] = std::exchange(p, p + matrix);
    } else {
      float* p = reinterpret_cast<float*>(memory);
      s.norm = std::exchange(p, p + rows);
      s.length = std::exchange(p, p + rows);
      s.u = std::exchange(p, p + matrix);
      for (int64_t c = 0; c < gradients; ++c) s.g[c] = std::exchange(p, p + matrix);
      if (spread) {
        s.tiles.side = std::exchange(p, p + rows);
        s.u_mean = std::exchange(p, p + width);
        s.base = std::exchange(p, p + width);
        uint16_t* bits = reinterpret_cast<uint16_t*>(p);
        s.tiles.rows = std::exchange(bits, bits + rows * width);
        s.tiles.columns = std::exchange(bits, bits + rows * width);
        s.tiles.pairs = bits;
      }
    }
    return s;
  }

  // Phase 1, for distances only: the mean token.
  void find_mean(Thread& t, const Sequence& s, int64_t b) const {
    std::fill(s.mean, s.mean + D, 0.0);
    for (int64_t i = 0; i < L; ++i)
      for (int64_t d = 0; d < D; d += kWideDepth) {
        const int64_t n = std::min(kWideDepth, D - d);
        read_token(z, b, i, d, n, t.wide_rows);
        for (int64_t e = 0; e < n; ++e) s.mean[d + e] += t.wide_rows[e];
      }
    for (int64_t d = 0; d < D; ++d) s.mean[d] /= static_cast<double>(L);
  }

  // Phase 2: unit vectors, or squared norms, of the tokens from i to stop; further results are kept in t.
  void prepare(Thread& t, const Sequence& s, int64_t b, int64_t i, int64_t stop) const {
    t.bad = 0;
    t.square_sum = 0;
    for (; i < stop; ++i) {
      if (!by_distance) {
        float* u = s.u + i * stride;
        std::fill(u + D, u + width, 0.0f);
        const float* row = direct ? static_cast<const float*>(z.data) + b * z.stride[0] + i * z.stride[1] : u;
        if (!direct) read_token(z, b, i, 0, D, u);
        t.bad += k.unit_row(o, row, u, D, s.norm + i, s.length + i);
        continue;
      }
      double square = 0;
      for (int64_t d = 0; d < D; d += kWideDepth) {
        const int64_t n = std::min(kWideDepth, D - d);
        read_token(z, b, i, d, n, t.wide_rows);
        for (int64_t e = 0; e < n; ++e) {
          const double x = t.wide_rows[e], centred = x - s.mean[d + e];
          t.square_sum += x * x;
          square += centred * centred;
        }
      }
      s.square[i] = square;
      t.bad += static_cast<float>(square * 0);
    }
  }

  // Reads features d to d + n of the tokens from i on as double, centred, with ones in column D and zeros beyond.
  void read_centred(const Sequence& s, int64_t b, int64_t i, int64_t rows, int64_t d, int64_t n, double* out) const {
    for (int64_t r = 0; r < rows; ++r, out += kWideDepth + kPad) {
      const int64_t real = std::min(n, D - d);
      if (real > 0) read_token(z, b, i + r, d, real, out);
      for (int64_t e = 0; e < real; ++e) out[e] -= s.mean[d + e];
      for (int64_t e = std::max<int64_t>(real, 0); e < n; ++e) out[e] = d + e == D ? 1.0 : 0.0;
    }
  }

  // S of the blocks of m tokens from i on and n tokens from j on.
  void products(Thread& t, const Sequence& s, int64_t b, int64_t i, int64_t j, int64_t m, int64_t n) const {
    const bool diagonal = i == j;
    if (by_distance) {
      constexpr int64_t ld = kWideDepth + kPad;
      const int64_t padded = round_up(D, kPad);
      for (int64_t d = 0; d < padded; d += kWideDepth) {
        const int64_t depth = std::min(kWideDepth, padded - d);
        read_centred(s, b, i, m, d, depth, t.wide_rows);
        if (!diagonal) read_centred(s, b, j, n, d, depth, t.wide_columns);
        k.wide_transpose(diagonal ? t.wide_rows : t.wide_columns, ld, n, depth, t.wide_panel, kTileStride);
        // The ones in column D are not part of the products.
        k.wide_multiply(m, round_up(n, kPad), std::min(depth, D - d), t.wide_rows, ld, t.wide_panel, kTileStride,
                        t.wide_tile, kTileStride, d > 0, diagonal);
      }
    } else {
      for (int64_t d = 0; d < width; d += kDepth) {
        const int64_t depth = std::min(kDepth, width - d);
        k.transpose(s.u + j * stride + d, stride, n, depth, t.panel, kTileStride);
        k.multiply(m, round_up(n, kPad), depth, s.u + i * stride + d, stride, t.panel, kTileStride, t.tile, kTileStride,
                   d > 0, diagonal);
      }
    }
  }

  // Calls function(i, j, m, n) for every n-th pair of blocks, from number t on.
  template <class Function>
  void for_pairs(int64_t block, int64_t t, int64_t n, Function function) const {
    for (int64_t number = t; number < block_pairs((L + block - 1) / block); number += n) {
      int64_t I, J;
      block_pair(number, &I, &J);
      const int64_t i = I * block, j = J * block;
      function(i, j, std::min(block, L - i), std::min(block, L - j));
    }
  }

  // The same for the pairs of round r < rounds(block). In round r, block I is paired with block J = r - I modulo the
  // number of rounds, which is odd: every block is in one pair only, and all rounds together contain each pair once.
  int64_t rounds(int64_t block) const { return ((L + block - 1) / block) | 1; }

  template <class Function>
  void for_pairs_of_round(int64_t r, int64_t block, int64_t t, int64_t n, Function function) const {
    const int64_t blocks = (L + block - 1) / block, all = rounds(block);
    int64_t number = 0;
    for (int64_t I = 0; I < blocks; ++I) {
      const int64_t J = (r - I + all) % all, i = I * block, j = J * block;
      if (J >= I && J < blocks && number++ % n == t) function(i, j, std::min(block, L - i), std::min(block, L - j));
    }
  }

  // Phase 3, with AMX tiles only: the mean unit vector, and the weight of a pair with the average cosine.
  void find_mean_unit(Sequence& s) const {
    spread->mean(s.u, stride, L, width, s.u_mean);
    double square = 0;
    for (int64_t d = 0; d < D; ++d) square += static_cast<double>(s.u_mean[d]) * s.u_mean[d];
    s.centre = fit.weight(square);
    for (int64_t d = 0; d < width; ++d) s.base[d] = s.centre * static_cast<float>(L) * s.u_mean[d];
  }

  // Phase 3, if needed: the largest cosine.
  void find_largest(Thread& t, const Sequence& s, int64_t b, int64_t i, int64_t j, int64_t m, int64_t n) const {
    products(t, s, b, i, j, m, n);
    t.most = std::max(t.most, k.largest(t.tile, kTileStride, m, n, i == j));
  }

  void clear_gradient(const Sequence& s, int64_t copy, int64_t i, int64_t stop) const {
    if (!need_grad) return;
    if (by_distance) std::fill(s.wide_g[copy] + i * stride, s.wide_g[copy] + stop * stride, 0.0);
    else std::fill(s.g[copy] + i * stride, s.g[copy] + stop * stride, 0.0f);
  }

  // Phase 4, for a pair of blocks: sums the values, and adds the weights times the other tokens to a G.
  void sum_pair(Thread& t, const Sequence& s, int64_t copy, int64_t b, bool first, int64_t i, int64_t j, int64_t m,
                int64_t n) const {
    const bool diagonal = i == j;
    if (spread) {
      t.sum += spread->sum_pair(fit, s.centre, s.tiles, width, i, m, j, n, need_grad ? s.g[copy] : nullptr, stride,
                                first, t.pair);
      return;
    }
    products(t, s, b, i, j, m, n);
    if (by_distance) {
      t.sum += k.weigh_distances(o.tau, s.square + i, s.square + j, t.wide_tile, kTileStride, m, n, diagonal,
                                 need_grad);
      if (!need_grad) return;
      constexpr int64_t ld = kWideDepth + kPad;
      double* const g = s.wide_g[copy];
      for (int64_t d = 0; d < width; d += kWideDepth) {
        const int64_t depth = std::min(kWideDepth, width - d);
        read_centred(s, b, j, n, d, depth, t.wide_columns);
        k.wide_multiply(m, depth, n, t.wide_tile, kTileStride, t.wide_columns, ld, g + i * stride + d, stride, true,
                        false);
        if (diagonal) continue;
        read_centred(s, b, i, m, d, depth, t.wide_rows);
        k.wide_multiply_transposed(n, depth, m, t.wide_tile, kTileStride, t.wide_rows, ld, g + j * stride + d, stride,
                                   true, false);
      }
    } else {
      t.sum += k.weigh_cosines(o, s.shift, t.tile, kTileStride, m, n, diagonal, need_grad);
      if (!need_grad) return;
      float* const g = s.g[copy];
      k.multiply(m, width, n, t.tile, kTileStride, s.u + j * stride, stride, g + i * stride, stride, true, false);
      if (diagonal) return;
      k.multiply_transposed(n, width, m, t.tile, kTileStride, s.u + i * stride, stride, g + j * stride, stride, true,
                            false);
    }
  }

  // Phase 5: the gradient of the tokens from i to stop, from the first `copies` G. s.sum is over the pairs i < j.
  void finish(const Sequence& s, int64_t copies, int64_t b, int64_t i, int64_t stop) const {
    const double tokens = static_cast<double>(L), pairs = tokens * (tokens - 1), batch = static_cast<double>(B);
    float* parts[kGradients] = {};
    if (s.bad) {
      std::fill(grad + (b * L + i) * D, grad + (b * L + stop) * D, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    for (; i < stop; ++i) {
      float* out = grad + (b * L + i) * D;
      if (by_distance) {
        double* g = s.wide_g[0] + i * stride;
        for (int64_t c = 1; c < copies; ++c)
          for (int64_t d = 0; d <= D; ++d) g[d] += s.wide_g[c][i * stride + d];
        const double scale = 4 / (o.tau * (2 * s.sum + tokens) * batch);
        const double pull = 0.2 / (batch * tokens * static_cast<double>(D));
        read_token(z, b, i, 0, D, out);
        for (int64_t d = 0; d < D; ++d) {
          const double x = out[d];
          out[d] = static_cast<float>(scale * (g[d] - g[D] * (x - s.mean[d])) + pull * x);
        }
      } else {
        double scale = 2 / (kPi * o.tau * 2 * s.sum);
        if (o.variant == Variant::orthogonalization) scale = 4 / (kPi * pairs);
        if (o.variant == Variant::decorrelation) scale = 4 / pairs;
        for (int64_t c = 0; c < copies; ++c) parts[c] = s.g[c] + i * stride;
        k.gradient_row(o, parts, static_cast<int>(copies), s.base, s.centre, s.u + i * stride, D, s.norm[i],
                       s.length[i], static_cast<float>(scale / batch), out);
      }
    }
  }

  double loss(const Sequence& s) const {
    if (s.bad) return std::numeric_limits<double>::quiet_NaN();
    const double tokens = static_cast<double>(L), pairs = tokens * (tokens - 1);
    if (o.variant == Variant::angular_spread) return std::log(2 * s.sum / pairs) - s.shift / (kPi * o.tau);
    if (by_distance)
      return std::log((2 * s.sum + tokens) / (tokens * tokens)) +
             0.1 * s.square_sum / (tokens * static_cast<double>(D));
    return 2 * s.sum / pairs;
  }

  // Computes `count` sequences from b on at the same time, with n threads each. All finish a phase before the next one
  // starts: split(f) runs f(q, t) for all q < count, t < n. Thread t of sequence q uses threads[q * n + t] and has the
  // tokens from first(t) on.
  template <class Split>
  void run(Sequence* sequences, int64_t count, Thread* threads, int64_t n, int64_t b, double* losses,
           Split split) const {
    const int64_t copies = gradients(n);
    int64_t block = spread ? kTileBlock : kBlock;  // smaller ones balance better
    const int64_t least = n == 1 ? block : copies > 1 ? kBlock / 2 : kBlock / 4;
    while (block > least && L < 2 * n * block) block /= 2;
    const auto first = [&](int64_t t) { return t * L / n; };
    const auto for_members = [&](int64_t q, auto function) {
      for (int64_t t = 0; t < n; ++t) function(threads[q * n + t]);
    };

    if (by_distance)
      split([&](int64_t q, int64_t t) {
        if (t == 0) find_mean(threads[q * n], sequences[q], b + q);
      });
    split([&](int64_t q, int64_t t) { prepare(threads[q * n + t], sequences[q], b + q, first(t), first(t + 1)); });
    for (int64_t q = 0; q < count; ++q) {
      double bad = 0;
      sequences[q].square_sum = 0;
      for_members(q, [&](const Thread& t) { bad += t.bad, sequences[q].square_sum += t.square_sum; });
      sequences[q].bad = bad != 0 || std::isnan(bad);
      sequences[q].shift = o.smallest_angle();
    }

    if (spread) {
      split([&](int64_t q, int64_t t) {
        if (t == 0) find_mean_unit(sequences[q]);
      });
      split([&](int64_t q, int64_t t) {
        const int64_t groups = rows / kTileTokens;
        const Sequence& s = sequences[q];
        spread->lay_out(s.u, stride, L, width, s.u_mean, t * groups / n, (t + 1) * groups / n, s.tiles);
      });
    }

    if (o.shift_must_be_found()) {
      split([&](int64_t q, int64_t t) {
        threads[q * n + t].most = -2;
        if (sequences[q].bad) return;
        for_pairs(block, t, n, [&](auto... pair) { find_largest(threads[q * n + t], sequences[q], b + q, pair...); });
      });
      for (int64_t q = 0; q < count; ++q) {
        double most = o.clamp - 1;
        for_members(q, [&](const Thread& t) { most = std::max(most, static_cast<double>(t.most)); });
        sequences[q].shift = std::acos(std::min(most, 1 - o.clamp));
      }
    }

    split([&](int64_t q, int64_t t) {
      threads[q * n + t].sum = 0;
      if (copies < n) clear_gradient(sequences[q], 0, first(t), first(t + 1));
      else if (!spread || n > 1) clear_gradient(sequences[q], t, 0, L);
      if (copies < n || sequences[q].bad) return;
      for_pairs(block, t, n, [&](int64_t i, auto... pair) {
        const bool first_of_J = n == 1 && i == 0;  // (0, J) is the first pair of J
        sum_pair(threads[q * n + t], sequences[q], t, b + q, first_of_J, i, pair...);
      });
    });
    for (int64_t round = 0; copies < n && round < rounds(block); ++round)
      split([&](int64_t q, int64_t t) {
        if (sequences[q].bad) return;
        for_pairs_of_round(round, block, t, n,
                           [&](auto... pair) { sum_pair(threads[q * n + t], sequences[q], 0, b + q, false, pair...); });
      });
    for (int64_t q = 0; q < count; ++q) {
      sequences[q].sum = 0;
      for_members(q, [&](const Thread& t) { sequences[q].sum += t.sum; });
      losses[b + q] = loss(sequences[q]);
    }
    if (need_grad)
      split([&](int64_t q, int64_t t) { finish(sequences[q], copies, b + q, first(t), first(t + 1)); });
  }
};

// AMX tiles round to bfloat16. They are used only if the caller allows rounding, and if the options make the weight of
// a pair insensitive to errors of its cosine.
const SpreadKernels* spread_kernels_for(const Options& o, const TokenVectors& z, bool may_round) {
  const bool gentle = o.variant == Variant::angular_spread && o.tau >= 0.5 && o.clamp >= 0.2;
  const bool large = z.size[1] >= kTileTokens && z.size[2] >= kPad;  // errors average out, and it is faster
  if (!gentle || !may_round || !large || best_instruction_set() != InstructionSet::amx) return nullptr;
  return spread_kernels();
}

}  // namespace

double dispersion(const TokenVectors& z, const Options& options, bool may_round, float* grad) {
  const Call call{z, options, grad != nullptr, grad, choose_kernels(), spread_kernels_for(options, z, may_round)};

  const int64_t threads = minidisp::threads();
  const int64_t dealt = call.B / threads * threads, left = call.B - dealt;
  // The remaining sequences are computed at the same time if each gets two threads, otherwise in two rounds.
  const int64_t teams = 2 * left <= threads ? left : (left + 1) / 2;
  const int64_t team_gradients = gradients(threads / std::max<int64_t>(teams, 1));

  const auto spaced = [](int64_t bytes) { return round_up(bytes, 64) + 192; };  // 192: avoids powers of two
  const int64_t thread_bytes = spaced(call.thread_bytes());
  const int64_t dealt_bytes = spaced(call.sequence_bytes(1)), team_bytes = spaced(call.sequence_bytes(team_gradients));
  const int64_t bytes = threads * thread_bytes + std::max(dealt ? threads * dealt_bytes : 0, teams * team_bytes);
  const Memory memory(bytes + 64);
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory.data()) % 64);
  char* const start = static_cast<char*>(memory.data()) + (misaligned ? 64 - misaligned : 0);
  char* const rest = start + threads * thread_bytes;
  std::vector<Thread> all(threads);
  std::vector<Sequence> sequences(threads);
  for (int64_t t = 0; t < threads; ++t) all[t] = call.thread_at(start + t * thread_bytes);

  std::vector<double> losses(call.B);
  if (dealt > 0) {
    for (int64_t t = 0; t < threads; ++t) sequences[t] = call.sequence_at(rest + t * dealt_bytes, 1);
    parallel_for(0, threads, 1, [&](int64_t t, int64_t stop) {
      for (; t < stop; ++t)
        for (int64_t b = t; b < dealt; b += threads)
          call.run(&sequences[t], 1, &all[t], 1, b, losses.data(), [](const auto& function) { function(0, 0); });
    });
  }
  for (int64_t q = 0; q < teams; ++q) sequences[q] = call.sequence_at(rest + q * team_bytes, team_gradients);
  for (int64_t b = dealt; b < call.B; b += teams) {
    const int64_t count = std::min(teams, call.B - b), n = threads / count;
    call.run(sequences.data(), count, all.data(), n, b, losses.data(), [&](const auto& function) {
      parallel_for(0, count * n, 1, [&](int64_t i, int64_t stop) {
        for (; i < stop; ++i) function(i / n, i % n);
      });
    });
  }

  double loss = 0;
  for (double x : losses) loss += x;
  return loss / static_cast<double>(call.B);
}

}  // namespace minidisp
