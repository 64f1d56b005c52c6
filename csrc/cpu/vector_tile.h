// The basis of all vector code on the CPU: vectors, register blocks of a matrix product, transposition. It uses the
// vector extensions of GCC and Clang, so it compiles for any processor. Included by instruction_sets.h.

constexpr int kVectors = 2;  // width of the register block

typedef float F __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
typedef double D __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t L __attribute__((vector_size(VECTOR_BYTES)));
typedef float HalfF __attribute__((vector_size(VECTOR_BYTES / 2)));  // as many floats as D has doubles
typedef int32_t HalfI __attribute__((vector_size(VECTOR_BYTES / 2)));

template <class T> struct VectorOf;
template <> struct VectorOf<float> { using V = F; using Mask = I; };
template <> struct VectorOf<double> { using V = D; using Mask = L; };
template <class V> struct IntegerOf;
template <> struct IntegerOf<F> { using Type = I; };
template <> struct IntegerOf<HalfF> { using Type = HalfI; };
template <class T> constexpr int lanes() { return VECTOR_BYTES / sizeof(T); }

template <class V, class T>
PAIR_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
PAIR_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
typedef uint32_t U __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Short __attribute__((vector_size(VECTOR_BYTES / 2)));
constexpr int64_t W = lanes<float>();

// W elements as floats, or the first count of them and zeros.
PAIR_INLINE F read(const float* p) { return load<F>(p); }
PAIR_INLINE F read(const BFloat16* p) { return (F)(__builtin_convertvector(load<Short>(p), U) << 16); }
template <class T>
PAIR_INLINE F read(const T* p, int64_t count) {
  if (count >= W) return read(p);
  T part[W] = {};
  for (int64_t d = 0; d < count; ++d) part[d] = p[d];
  return read(part);
}
PAIR_INLINE void write(float* p, F x) { store(p, x); }
PAIR_INLINE void write(BFloat16* p, F x) {  // rounded to the nearest, ties to even
  U bits = (U)x;
  bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  bits = x == x ? bits : U{} + 0x7fc0;
  store(p, __builtin_convertvector(bits, Short));
}
template <class T>
PAIR_INLINE void write(T* p, F x, int64_t count) {
  if (count >= W) return write(p, x);
  T part[W];
  write(part, x);
  for (int64_t d = 0; d < count; ++d) p[d] = part[d];
}

// Calls function(d, part) for every vector of a row; part: the number of its elements that are in the row.
template <class Function>
PAIR_INLINE void for_vectors(int64_t width, Function function) {
  int64_t d = 0;
  for (; d + W <= width; d += W) function(d, std::integral_constant<int64_t, W>());
  if (d < width) function(d, width - d);
}

// C += A B for a block of M rows and N vectors that fits in registers: summed from zero, then added. A(m, k) is
// a[m * lda + k], or a[k * lda + m] if kTransposed.
template <class T, int M, int N, bool kTransposed>
void register_block(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* c, int64_t ldc, bool add) {
  using V = typename VectorOf<T>::V;
  constexpr int W = lanes<T>();
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) __builtin_prefetch(c + m * ldc + n * W, 1);
  const T* rows[(M + 2) / 3];  // every third row; the addressing mode reaches those in between
  for (int m = 0; m < M; m += 3) rows[m / 3] = a + m * lda;
  V sum[M][N] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    V right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load<V>(b + k * ldb + n * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const T left = kTransposed ? a[k * lda + m] : rows[m / 3][(m % 3) * lda + k];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T* p = c + m * ldc + n * W;
      store(p, add ? load<V>(p) + sum[m][n] : sum[m][n]);
    }
}

template <class T>
using Block = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*, int64_t, bool);

template <class T, int N, bool kTransposed, int... M>
Block<T> block_of(int rows, std::integer_sequence<int, M...>) {
  static constexpr Block<T> table[] = {register_block<T, M + 1, N, kTransposed>...};
  return table[rows - 1];
}

// One of the log2(lanes) steps of transposing a square of vectors: swaps the off-diagonal squares of side S.
template <class T, int S>
PAIR_INLINE void transpose_step(typename VectorOf<T>::V* r) {
  using V = typename VectorOf<T>::V;
  using Mask = typename VectorOf<T>::Mask;
  constexpr int W = lanes<T>();
  Mask low{}, high{};
#pragma GCC unroll 16
  for (int l = 0; l < W; ++l) {
    low[l] = l & S ? W + l - S : l;
    high[l] = l & S ? W + l : l + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) {
      const V a = r[i], b = r[i + S];
#if defined(__clang__)
      for (int l = 0; l < W; ++l) {
        r[i][l] = l & S ? b[l - S] : a[l];
        r[i + S][l] = l & S ? b[l] : a[l + S];
      }
#else
      r[i] = __builtin_shuffle(a, b, low);
      r[i + S] = __builtin_shuffle(a, b, high);
#endif
    }
  if constexpr (2 * S < W) transpose_step<T, 2 * S>(r);
}

// In double, by halves: adding one lane after another would be a long chain of dependent additions.
PAIR_INLINE double sum_lanes(D v) {
  double part[lanes<double>()];
  store(part, v);
  for (int n = lanes<double>() / 2; n > 0; n /= 2)
    for (int l = 0; l < n; ++l) part[l] += part[l + n];
  return part[0];
}
PAIR_INLINE double sum_lanes(F v) {
  HalfF half[2];
  std::memcpy(half, &v, sizeof v);
  return sum_lanes(__builtin_convertvector(half[0], D) + __builtin_convertvector(half[1], D));
}
