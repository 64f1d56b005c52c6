// Vector code of a block's small operators, all computed in float. Included by instruction_sets.h.

#include "vector_tile.h"

PAIR_INLINE float sum_of(F v) {
  float part[W];
  store(part, v);
  for (int64_t n = W / 2; n > 0; n /= 2)
    for (int64_t l = 0; l < n; ++l) part[l] += part[l + n];
  return part[0];
}

// The sums of both results of terms(d, part) over a row, as four partial sums each to hide latency.
template <class Function>
PAIR_INLINE std::pair<float, float> row_sums(int64_t width, Function terms) {
  F first[4] = {}, second[4] = {};
  int64_t u = 0;
  for_vectors(width, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
    const auto [a, b] = terms(d, part);
    first[u % 4] += a;
    second[u % 4] += b;
    ++u;
  });
  return {sum_of((first[0] + first[1]) + (first[2] + first[3])),
          sum_of((second[0] + second[1]) + (second[2] + second[3]))};
}

struct Two {
  F first, second;
};

template <class T>
PAIR_INLINE void add_to(T* p, F x, int64_t part) {
  write(p, read(p, part) + x, part);
}

struct Moments {
  float mean, rate;  // rate: 1 / standard deviation, or 1 / root mean square
};

template <class X>
PAIR_INLINE Moments moments(const X* x, const NormWork& n) {
  float mean = 0;
  if (n.centred)
    mean = row_sums(n.width, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
             return Two{read(x + d, part), F{}};
           }).first /
           n.width;
  I lane;
  for (int l = 0; l < W; ++l) lane[l] = l;
  const float squares = row_sums(n.width, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
                          F r = read(x + d, part) - mean;
                          if (part < W) r = lane < static_cast<int32_t>(part) ? r : F{};  // beyond the row
                          return Two{r * r, F{}};
                        }).first;
  return {mean, 1 / std::sqrt(squares / n.width + n.eps)};
}

template <class X, class Y>
void norm(const NormWork& n, int64_t begin, int64_t end) {
  const int64_t C = n.width;
  for (int64_t i = begin; i < end; ++i) {
    const X* x = static_cast<const X*>(n.x) + i * C;
    Y* y = static_cast<Y*>(n.out) + i * C;
    const Moments m = moments(x, n);
    for_vectors(C, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
      F r = (read(x + d, part) - m.mean) * m.rate * read(n.weight + d, part);
      if (n.bias != nullptr) r += read(n.bias + d, part);
      write(y + d, r, part);
    });
  }
}

template <class X, class Y>
void norm_backward(const NormWork& n, int64_t begin, int64_t end, float* sums) {
  const int64_t C = n.width;
  for (int64_t i = begin; i < end; ++i) {
    const X* x = static_cast<const X*>(n.x) + i * C;
    const Y* grad = static_cast<const Y*>(n.grad) + i * C;
    X* grad_x = static_cast<X*>(n.grad_x) + i * C;
    const Moments m = moments(x, n);
    const auto [along, constant] = row_sums(C, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
      const F g = read(grad + d, part), normal = (read(x + d, part) - m.mean) * m.rate;
      const F slope = g * read(n.weight + d, part);
      add_to(sums + d, g * normal, part);
      add_to(sums + C + d, g, part);
      return Two{slope * normal, slope};
    });
    const float a = along / C, c = n.centred ? constant / C : 0;
    for_vectors(C, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
      const F normal = (read(x + d, part) - m.mean) * m.rate, slope = read(grad + d, part) * read(n.weight + d, part);
      write(grad_x + d, m.rate * (slope - c - normal * a), part);
    });
  }
}

// Calls function(offset, weight, offset in sums) for every head of queries and keys.
template <class Function>
PAIR_INLINE void for_heads(const RotateWork& r, Function function) {
  for (int64_t h = 0; h < r.n_head + r.n_kv_head; ++h)
    function(h * r.width, h < r.n_head ? r.q_weight : r.k_weight, h < r.n_head ? 0 : r.width);
}

template <class T>
PAIR_INLINE float head_rate(const T* x, const RotateWork& r) {
  const float squares = row_sums(r.width, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
                          const F v = read(x + d, part);
                          return Two{v * v, F{}};
                        }).first;
  return 1 / std::sqrt(squares / r.width + r.eps);
}

// Channel i is paired with channel i + width / 2.
template <class T>
void rotate(const RotateWork& r, int64_t begin, int64_t end) {
  const int64_t half = r.width / 2, row = (r.n_head + 2 * r.n_kv_head) * r.width, values = row - r.n_kv_head * r.width;
  for (int64_t i = begin; i < end; ++i) {
    const T* qkv = static_cast<const T*>(r.qkv) + i * row;
    T* out = static_cast<T*>(r.out) + i * row;
    const float *cos = r.cos + i % r.tokens * r.width, *sin = r.sin + i % r.tokens * r.width;
    for_heads(r, [&](int64_t at, const float* weight, int64_t) PAIR_INLINE_LAMBDA {
      const T* x = qkv + at;
      T* y = out + at;
      const float rate = head_rate(x, r);
      for_vectors(half, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
        const int64_t e = d + half;
        const F a = read(x + d, part) * rate * read(weight + d, part);
        const F b = read(x + e, part) * rate * read(weight + e, part);
        write(y + d, a * read(cos + d, part) - b * read(sin + d, part), part);
        write(y + e, b * read(cos + e, part) + a * read(sin + e, part), part);
      });
    });
    std::copy_n(qkv + values, row - values, out + values);
  }
}

template <class T>
void rotate_backward(const RotateWork& r, int64_t begin, int64_t end, float* sums) {
  const int64_t D = r.width, half = D / 2, row = (r.n_head + 2 * r.n_kv_head) * D, values = row - r.n_kv_head * D;
  for (int64_t i = begin; i < end; ++i) {
    const T *qkv = static_cast<const T*>(r.qkv) + i * row, *grad = static_cast<const T*>(r.grad) + i * row;
    T* out = static_cast<T*>(r.grad_qkv) + i * row;
    const float *cos = r.cos + i % r.tokens * D, *sin = r.sin + i % r.tokens * D;
    for_heads(r, [&](int64_t at, const float* weight, int64_t own) PAIR_INLINE_LAMBDA {
      const T *x = qkv + at, *g = grad + at;
      T* y = out + at;
      float* sum = sums + own;
      const float rate = head_rate(x, r);
      // The gradient rotated back: that of the input of the rotation.
      const auto turned = [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
        const int64_t e = d + half;
        const F a = read(g + d, part), b = read(g + e, part);
        return Two{a * read(cos + d, part) + b * read(sin + e, part),
                   b * read(cos + e, part) - a * read(sin + d, part)};
      };
      const float along = row_sums(half, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
                            const auto [a, b] = turned(d, part);
                            const F first = a * read(x + d, part) * rate, second = b * read(x + d + half, part) * rate;
                            add_to(sum + d, first, part);
                            add_to(sum + d + half, second, part);
                            return Two{first * read(weight + d, part) + second * read(weight + d + half, part), F{}};
                          }).first;
      const F common = F{} + along / D * rate;
      for_vectors(half, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
        const auto [a, b] = turned(d, part);
        write(y + d, rate * (a * read(weight + d, part) - read(x + d, part) * common), part);
        write(y + d + half, rate * (b * read(weight + d + half, part) - read(x + d + half, part) * common), part);
      });
    });
    std::copy_n(grad + values, row - values, out + values);
  }
}

template <class T>
void squared_relu(const void* x, void* out, int64_t begin, int64_t end) {
  for_vectors(end - begin, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
    const F v = read(static_cast<const T*>(x) + begin + d, part);
    write(static_cast<T*>(out) + begin + d, v < 0 ? F{} : v * v, part);  // NaN stays NaN
  });
}

template <class T>
void squared_relu_backward(const void* grad, const void* x, void* out, int64_t begin, int64_t end) {
  for_vectors(end - begin, [&](int64_t d, auto part) PAIR_INLINE_LAMBDA {
    const F v = read(static_cast<const T*>(x) + begin + d, part);
    const F g = read(static_cast<const T*>(grad) + begin + d, part);
    write(static_cast<T*>(out) + begin + d, v <= 0 ? F{} : g * (v + v), part);
  });
}

using B16 = BFloat16;

// table[index[l]] in lane l.
PAIR_INLINE F gather(const float* table, const uint16_t* index) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  return __builtin_ia32_gathersiv16sf(F{}, table, (I)__builtin_convertvector(load<Short>(index), U), -1, sizeof(float));
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  const I lanes = (I)__builtin_convertvector(load<Short>(index), U);
  return __builtin_ia32_gathersiv8sf(F{}, table, lanes, (F)(I{} - 1), sizeof(float));
#else
  float part[W];
  for (int64_t l = 0; l < W; ++l) part[l] = table[index[l]];
  return load<F>(part);
#endif
}

void lookup_backward(const void* grad, const void* x, const float* slopes, void* out, int64_t begin, int64_t end) {
  const uint16_t* in = static_cast<const uint16_t*>(x) + begin;
  const B16* g = static_cast<const B16*>(grad) + begin;
  B16* y = static_cast<B16*>(out) + begin;
  int64_t i = 0;
  for (; i + W <= end - begin; i += W) write(y + i, read(g + i) * gather(slopes, in + i));
  for (; i < end - begin; ++i) y[i] = BFloat16::of(static_cast<float>(g[i]) * slopes[in[i]]);
}

// Processes strips of 64 columns, so that few rows of out are written at a time, 32 rows at a time, which fill whole
// cache lines there.
void transpose(const void* from, int64_t rows, int64_t columns, void* to, float* sums, int64_t begin, int64_t end) {
  constexpr int64_t kStrip = 64, kLine = 32;
  const B16* g = static_cast<const B16*>(from);
  B16* out = static_cast<B16*>(to);
  for (int64_t strip = begin; strip < end; strip += kStrip) {
    F sum[kStrip / W] = {};
    for (int64_t i = 0; i < rows; i += kLine)
      for (int64_t c = strip; c < std::min(end, strip + kStrip); c += W) {
        const int64_t part = std::min(W, end - c), lines = std::min(kLine, rows - i);
        alignas(64) B16 line[W * kLine];
        F total{};
        for (int64_t half = 0; half < lines; half += W) {
          const B16* p = g + (i + half) * columns + c;
          F r[W];
          if (part == W && half + W <= lines) {
#pragma GCC unroll 16
            for (int64_t l = 0; l < W; ++l) r[l] = read(p + l * columns);
          } else {
            for (int64_t l = 0; l < W; ++l) r[l] = half + l < lines ? read(p + l * columns, part) : F{};
          }
#pragma GCC unroll 16
          for (int64_t l = 0; l < W; ++l) total += r[l];
          transpose_step<float, 1>(r);
#pragma GCC unroll 16
          for (int64_t l = 0; l < W; ++l)  // the conversion is exact
            store(line + l * kLine + half, __builtin_convertvector((U)r[l] >> 16, Short));
        }
        sum[(c - strip) / W] += total;
        for (int64_t l = 0; l < part; ++l) {
          if (lines == kLine) std::memcpy(out + (c + l) * rows + i, line + l * kLine, sizeof(B16) * kLine);
          else std::copy_n(line + l * kLine, lines, out + (c + l) * rows + i);
        }
      }
    for (int64_t c = strip; c < std::min(end, strip + kStrip); c += W) write(sums + c, sum[(c - strip) / W], end - c);
  }
}

template <class T>
constexpr RowKernels row_kernels = {rotate<T>, rotate_backward<T>, squared_relu<T>, squared_relu_backward<T>};

template <class X, class Y>
constexpr LayerKernels norm_kernels = {norm<X, Y>, norm_backward<X, Y>};

const Kernels kernels = {
    {{norm_kernels<float, float>, norm_kernels<float, B16>}, {norm_kernels<B16, float>, norm_kernels<B16, B16>}},
    {row_kernels<float>, row_kernels<B16>},
    {lookup_backward, transpose}};
