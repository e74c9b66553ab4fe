// One step of a GPT-2 or a Llama: read a token per row, with keys and values in pages (`pages.py`).
//
// A step is one call, so that nothing but the weights takes time. Every sum is added in an order that depends on the
// row alone: a row has the same bits whatever other rows are read. Vectors are written with the extensions of GCC and
// Clang, which serve any processor. `native.py` compiles and calls this; its structures have the same fields.
//
// Letters: B rows, C channels, H query heads, K key-value heads, D channels of a head.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;  // numbers in a vector, vectors in the processor
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 32;
#endif
constexpr int TILE = 6;    // rows whose sums are in registers together
constexpr int ROWS = 24;   // rows that are multiplied by a part of a weight while it is in the cache
constexpr int PART = 64;   // inputs of such a part
constexpr int GROUP = 32;  // inputs of int8 weights that have a scale of their own
constexpr int PANEL = 64;  // outputs of a weight that are stored together: (outputs / PANEL, inputs, PANEL), and for
                           // int8 (outputs / PANEL, inputs / 2, PANEL, 2)
constexpr int AHEAD = 4096;  // bytes of weights that are asked for before they are used: 5 to 20 % faster
constexpr int PAGE = 64;   // positions of a page: keys are (D, PAGE), values (PAGE, D)

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(2 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
struct bfloat16 { uint16_t bits; };

static inline Vector load(const float* p) { Vector v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
#if defined(__AVX512F__)  // GCC 12 converts these number by number
static inline Integers widen(Halves h) { return (Integers)_mm512_cvtepu16_epi32((__m256i)h); }
static inline Shorts widen(Bytes b) { return (Shorts)_mm512_cvtepi8_epi16((__m256i)b); }
#elif defined(__AVX2__)
static inline Integers widen(Halves h) { return (Integers)_mm256_cvtepu16_epi32((__m128i)h); }
static inline Shorts widen(Bytes b) { return (Shorts)_mm256_cvtepi8_epi16((__m128i)b); }
#else
static inline Integers widen(Halves h) { return __builtin_convertvector(h, Integers); }
static inline Shorts widen(Bytes b) { return __builtin_convertvector(b, Shorts); }
#endif
static inline Vector load(const bfloat16* p) { Halves h; std::memcpy(&h, p, sizeof h); return (Vector)(widen(h) << 16); }
static inline Shorts load(const int8_t* p) { Bytes b; std::memcpy(&b, p, sizeof b); return widen(b); }
static inline float number(float x) { return x; }
static inline float number(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(bfloat16* p, float x) {  // rounded to nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---------------------------------------------------------------- structures of native.py

enum Kind { FLOAT, BFLOAT, INT8 };

struct Matrix {
  const void* panels;
  const bfloat16* scale;  // of int8 panels: (outputs / PANEL, inputs / GROUP, PANEL)
  const float* bias;      // of each output; null: none
  int64_t inputs, outputs, kind;
};

struct Norm {
  const float *weight, *bias;  // null: none
  int64_t centered;            // a LayerNorm; otherwise an RMSNorm
  float eps;
};

struct Layer {
  Norm norm1, norm2, q_norm, k_norm;  // no weight: no norm
  Matrix qkv, o, gate, up, down;      // no gate: an activation instead
  int64_t rotates;
};

struct Model {
  const Layer* layers;
  Norm norm;
  Matrix head;
  const float* frequencies;  // of the D / 2 channel pairs
  int64_t n_layer, channels, heads, kv_heads, head_dim, inner, activation, cache_kind;
};

struct Step {
  const int64_t *position, *table;  // (B,), and the pages of each row: (B, width)
  void *keys, *values;              // (layers, pages, K, D, PAGE) and (layers, pages, K, PAGE, D)
  float *x, *scratch;               // residual stream (B, C); see `scratch_size`
  int64_t rows, width, pages, threads;
};

// The sizes of the structures and of their parts, for a test.
extern "C" void sizes(int64_t* out) {
  const int64_t all[] = {sizeof(Matrix), sizeof(Norm), sizeof(Layer), sizeof(Model), sizeof(Step), PAGE, PANEL, GROUP};
  std::copy(std::begin(all), std::end(all), out);
}

// ---------------------------------------------------------------- functions of each number

// exp(x), clamped to finite results, with a relative error below 2e-7: x = n ln 2 + r, and a polynomial of r with the
// coefficients of expf in Moshier's Cephes library.
static inline Vector exponential(Vector x) {
  const Vector zero = {};
  x = x < -87.0f ? zero - 87.0f : x;
  x = x > 88.0f ? zero + 88.0f : x;
  Vector n = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  Integers i = (Integers)n << 23;
  n -= 12582912.0f;
  x = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector y = zero + 1.9875691500e-4f;
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * x * x + x + 1.0f;
  return x != x ? x : (Vector)((Integers)y + i);  // a NaN stays one
}

enum Activation { SILU, GELU_NEW, GELU, RELU };

static inline Vector activate(Vector x, int64_t kind) {
  const Vector zero = {};
  if (kind == SILU) return x / (1.0f + exponential(-x));
  if (kind == GELU_NEW) return x / (1.0f + exponential(x * -1.59576912f * (1.0f + 0.044715f * x * x)));
  if (kind == RELU) return x < 0.0f ? zero : x;
  for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
  return x;
}

static inline float sum(Vector v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

// Normalize n numbers from x to y.
static void normalize(const Norm& norm, const float* x, float* y, int64_t n) {
  float mean = 0, square = 0;
  int64_t whole = n / LANES * LANES;
  if (norm.centered) {
    Vector total = {};
    for (int64_t i = 0; i < whole; i += LANES) total += load(x + i);
    mean = sum(total);
    for (int64_t i = whole; i < n; i++) mean += x[i];
    mean /= n;
  }
  Vector total = {};
  for (int64_t i = 0; i < whole; i += LANES) { Vector d = load(x + i) - mean; total += d * d; }
  square = sum(total);
  for (int64_t i = whole; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
  float scale = 1.0f / std::sqrt(square / n + norm.eps);
  for (int64_t i = 0; i < n; i++) {
    y[i] = (x[i] - mean) * scale * norm.weight[i];
    if (norm.bias) y[i] += norm.bias[i];
  }
}

// ---------------------------------------------------------------- products

// Ask for the bytes that a single row needs AHEAD bytes later. With more rows, the processor has enough other work.
template <int R>
static inline void prefetch(const void* w, int bytes) {
  for (int i = 0; i < bytes && R == 1; i += 64) __builtin_prefetch((const char*)w + AHEAD + i);
}

// Vectors of a panel whose sums are in registers together, for R rows.
constexpr int together(int R) {
  return 8 * LANES <= PANEL && 8 * R < REGISTERS - 1 ? 8 : 4 * R + 4 < REGISTERS ? 4 : 2;
}

// Call f(R) with the number of rows, at most TILE, as a constant.
template <typename F>
static inline void with_rows(int64_t rows, F f) {
  switch (rows) {
    case 1: f(std::integral_constant<int, 1>()); break;
    case 2: f(std::integral_constant<int, 2>()); break;
    case 3: f(std::integral_constant<int, 3>()); break;
    case 4: f(std::integral_constant<int, 4>()); break;
    case 5: f(std::integral_constant<int, 5>()); break;
    default: f(std::integral_constant<int, 6>());
  }
}

// Add x (R, inputs) * w (inputs, N vectors) to y (R, N vectors). Rows of w are PANEL numbers apart.
template <typename W, int R, int N>
static inline void add_tile(const float* x, int64_t x_stride, const W* w, int64_t inputs, float* y) {
  Vector sums[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) sums[r][n] = load(y + r * PANEL + n * LANES);
  for (int64_t i = 0; i < inputs; i++, w += PANEL) {
    prefetch<R>(w, N * LANES * sizeof(W));
    Vector each[N];
    for (int n = 0; n < N; n++) each[n] = load(w + n * LANES);
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) sums[r][n] += x[r * x_stride + i] * each[n];
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) store(y + r * PANEL + n * LANES, sums[r][n]);
}

// y (rows, PANEL) = x (rows, inputs) * w (inputs, PANEL).
template <typename W>
static void multiply(int64_t rows, const float* x, int64_t x_stride, const W* w, int64_t inputs, float* y) {
  std::fill(y, y + rows * PANEL, 0.0f);
  for (int64_t i = 0; i < inputs; i += PART) {
    int64_t some = std::min<int64_t>(PART, inputs - i);
    for (int64_t r = 0; r < rows; r += TILE)
      with_rows(std::min<int64_t>(TILE, rows - r), [&](auto count) {
        constexpr int R = decltype(count)::value, N = together(R);
        for (int n = 0; n < PANEL; n += N * LANES)
          add_tile<W, R, N>(x + r * x_stride + i, x_stride, w + i * PANEL + n, some, y + r * PANEL + n);
      });
  }
}

// ---------------------------------------------------------------- products with int8 weights
//
// An input is rounded to 16 bits, by a scale for each GROUP of them: the error is a 65,000th of the largest of a group.
// Products of 8 and 16 bits are exact, and so is the sum of 32 of them in 32 bits: the same on every processor.

static inline int64_t groups_of(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }

// Round x (inputs) to q (groups * GROUP) and a scale for each group. A scale is NaN if an input is not finite.
static void round_inputs(const float* x, int64_t inputs, int16_t* q, float* scale) {
  for (int64_t g = 0; g < groups_of(inputs); g++, q += GROUP) {
    float part[GROUP] = {};
    std::memcpy(part, x + g * GROUP, std::min<int64_t>(GROUP, inputs - g * GROUP) * sizeof(float));
    Vector most = {}, check = {};
    for (int i = 0; i < GROUP; i += LANES) {
      Vector v = load(part + i), size = v < 0.0f ? -v : v;
      most = size > most ? size : most;
      check += v * 0.0f;
    }
    float largest = most[0];
    for (int i = 1; i < LANES; i++) largest = std::max(largest, most[i]);
    float inverse = largest > 1e-30f ? 32767.0f / largest : 0.0f;
    scale[g] = largest / 32767.0f + sum(check);
    for (int i = 0; i < GROUP; i++) q[i] = int16_t(int32_t(part[i] * inverse + 12582912.0f - 12582912.0f));
  }
}

// Add to each sum the products of a pair of weights and a pair of inputs.
static inline Integers add_pairs(Integers sums, Shorts w, const int16_t* pair) {
  int32_t x;
  std::memcpy(&x, pair, sizeof x);
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX512F__)
  return sums + (Integers)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  return sums + (Integers)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
#else  // the first of a pair is in the lower half
  return sums + ((Integers)w << 16 >> 16) * pair[0] + ((Integers)w >> 16) * pair[1];
#endif
}

// Add x (R, GROUP) * w (GROUP / 2, PANEL, 2) to y (R, N vectors), times the scale of each row and of each output.
template <int R, int N>
static inline void add_group(const int16_t* x, int64_t x_stride, const float* x_scale, int64_t scale_stride,
                             const int8_t* w, const bfloat16* scale, float* y) {
  Integers sums[R][N] = {};
  for (int64_t i = 0; i < GROUP; i += 2, w += 2 * PANEL) {
    prefetch<R>(w, N * 2 * LANES);
    Shorts each[N];
    for (int n = 0; n < N; n++) each[n] = load(w + n * 2 * LANES);
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) sums[r][n] = add_pairs(sums[r][n], each[n], x + r * x_stride + i);
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      float* at = y + r * PANEL + n * LANES;
      Vector both = load(scale + n * LANES) * x_scale[r * scale_stride];
      store(at, load(at) + __builtin_convertvector(sums[r][n], Vector) * both);
    }
}

// y (rows, PANEL) = x (rows, groups * GROUP) * w (groups, GROUP / 2, PANEL, 2), with scales (rows, groups) and (groups,
// PANEL).
static void multiply(int64_t rows, const int16_t* x, const float* x_scale, const int8_t* w, const bfloat16* scale,
                     int64_t groups, float* y) {
  std::fill(y, y + rows * PANEL, 0.0f);
  for (int64_t g = 0; g < groups; g++)
    for (int64_t r = 0; r < rows; r += TILE)
      with_rows(std::min<int64_t>(TILE, rows - r), [&](auto count) {
        constexpr int R = decltype(count)::value, N = together(R);
        for (int n = 0; n < PANEL; n += N * LANES)
          add_group<R, N>(x + (r * groups + g) * GROUP, groups * GROUP, x_scale + r * groups + g, groups,
                          w + g * GROUP * PANEL + 2 * n, scale + g * PANEL + n, y + r * PANEL + n);
      });
}

// ---------------------------------------------------------------- products of a matrix

// The inputs of a matrix (rows, inputs): as they are, and rounded for int8 weights.
struct Inputs {
  const float* x;
  int16_t* rounded;  // (rows, groups * GROUP)
  float* scale;      // (rows, groups)
};

// y (rows, PANEL) = the rows from `first` on times panel `p` of a matrix, with its bias. Up to ROWS rows.
static void product(const Matrix& m, int64_t p, int64_t first, int64_t rows, const Inputs& in, float* y) {
  const float* x = in.x + first * m.inputs;
  int64_t at = p * m.inputs * PANEL;
  if (m.kind == FLOAT) multiply(rows, x, m.inputs, (const float*)m.panels + at, m.inputs, y);
  if (m.kind == BFLOAT) multiply(rows, x, m.inputs, (const bfloat16*)m.panels + at, m.inputs, y);
  if (m.kind == INT8) {
    int64_t groups = groups_of(m.inputs), size = groups * PANEL;
    const int16_t* q = in.rounded + first * groups * GROUP;
    multiply(rows, q, in.scale + first * groups, (const int8_t*)m.panels + p * size * GROUP, m.scale + p * size, groups, y);
  }
  if (!m.bias) return;
  int64_t outputs = std::min<int64_t>(PANEL, m.outputs - p * PANEL);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < outputs; j++) y[r * PANEL + j] += m.bias[p * PANEL + j];
}

// Compute x m, shared among the threads of a parallel region: f(y, row, first output, number of outputs) gets a part of
// each row. With a gate, y is activation(x gate) * x m; an activation below 0 means none. room: see `rounded_size`.
template <typename F>
static inline void each_part(const Matrix& m, const Matrix* gate, int64_t activation, int64_t rows, const float* x,
                             float* room, F f) {
  int64_t groups = groups_of(m.inputs);
  const Inputs in = {x, (int16_t*)(room + rows * groups), room};
  if (m.kind == INT8) {
#pragma omp for
    for (int64_t r = 0; r < rows; r++)
      round_inputs(in.x + r * m.inputs, m.inputs, in.rounded + r * groups * GROUP, in.scale + r * groups);
  }
#pragma omp for schedule(dynamic, 1)
  for (int64_t p = 0; p < (m.outputs + PANEL - 1) / PANEL; p++)
    for (int64_t first = 0; first < rows; first += ROWS) {
      float y[ROWS * PANEL], g[ROWS * PANEL];
      int64_t some = std::min<int64_t>(ROWS, rows - first), outputs = std::min<int64_t>(PANEL, m.outputs - p * PANEL);
      product(m, p, first, some, in, y);
      if (gate) product(*gate, p, first, some, in, g);
      for (int64_t j = 0; activation >= 0 && j < some * PANEL; j += LANES)
        store(y + j, gate ? activate(load(g + j), activation) * load(y + j) : activate(load(y + j), activation));
      for (int64_t r = 0; r < some; r++) f(y + r * PANEL, first + r, p * PANEL, outputs);
    }
}

template <typename F>
static inline void each_part(const Matrix& m, int64_t rows, const float* x, float* room, F f) {
  each_part(m, nullptr, -1, rows, x, room, f);
}

// ---------------------------------------------------------------- attention

// Attention of one query over positions 0 to `last`, in pages of keys and values that are `page_stride` numbers apart.
// q, y: D numbers. weights: room for (last / PAGE + 1) * PAGE numbers.
template <typename W>
static void attend(const float* q, const W* keys, const W* values, const int64_t* table, int64_t page_stride, int64_t last,
                   int64_t D, float* weights, float* y) {
  int64_t pages = last / PAGE + 1;
  for (int64_t n = 0; n < pages; n++)
    multiply(1, q, D, keys + table[n] * page_stride, D, weights + n * PAGE);
  for (int64_t s = last + 1; s < pages * PAGE; s++) weights[s] = -INFINITY;
  Vector most = load(weights);
  for (int64_t s = LANES; s < pages * PAGE; s += LANES) { Vector w = load(weights + s); most = w > most ? w : most; }
  float largest = most[0];
  for (int i = 1; i < LANES; i++) largest = std::max(largest, most[i]);
  for (int64_t s = 0; s < pages * PAGE; s += LANES) store(weights + s, exponential(load(weights + s) - largest));
  for (int64_t s = last + 1; s < pages * PAGE; s++) weights[s] = 0;
  Vector total = {};
  for (int64_t s = 0; s < pages * PAGE; s += LANES) total += load(weights + s);
  float scale = 1.0f / sum(total);
  int64_t d = 0;
  auto columns = [&](auto count) {
    constexpr int N = decltype(count)::value;
    for (; d + N * LANES <= D; d += N * LANES) {
      Vector sums[N] = {};
      for (int64_t n = 0; n < pages; n++) {
        const W* v = values + table[n] * page_stride + d;
        int64_t positions = std::min<int64_t>(PAGE, last + 1 - n * PAGE);
        for (int64_t s = 0; s < positions; s++, v += D)
          for (int i = 0; i < N; i++) sums[i] += weights[n * PAGE + s] * load(v + i * LANES);
      }
      for (int i = 0; i < N; i++) store(y + d + i * LANES, sums[i] * scale);
    }
  };
  columns(std::integral_constant<int, 4>());
  columns(std::integral_constant<int, 1>());
  for (; d < D; d++) {  // heads that are no multiple of a vector
    float one = 0;
    for (int64_t s = 0; s <= last; s++)
      one += weights[s] * number(values[table[s / PAGE] * page_stride + s % PAGE * D + d]);
    y[d] = one * scale;
  }
}

// Rotate the pairs (i, i + D/2) of one head.
static void rotate(float* x, const float* cos, const float* sin, int64_t D) {
  for (int64_t i = 0; i < D / 2; i++) {
    float a = x[i], b = x[i + D / 2];
    x[i] = a * cos[i] - b * sin[i];
    x[i + D / 2] = b * cos[i] + a * sin[i];
  }
}

// ---------------------------------------------------------------- the step

// Room for the rounded inputs of any matrix.
static int64_t rounded_size(const Model& m, int64_t rows) {
  return rows * groups_of(std::max({m.channels, m.heads * m.head_dim, m.inner})) * (1 + GROUP / 2);
}

// Numbers of scratch that `step` and `logits` need.
extern "C" int64_t scratch_size(const Model* m, int64_t rows, int64_t width, int64_t threads) {
  int64_t qkv = (m->heads + 2 * m->kv_heads) * m->head_dim;
  int64_t row = m->channels + qkv + m->heads * m->head_dim + m->inner + m->head_dim;
  return rounded_size(*m, rows) + rows * row + threads * width * PAGE;
}

template <typename W>
static void run(const Model& m, const Step& s) {
  const int64_t B = s.rows, C = m.channels, H = m.heads, K = m.kv_heads, D = m.head_dim, qkv_size = (H + 2 * K) * D;
  float *room = s.scratch, *h = room + rounded_size(m, B), *qkv = h + B * C, *y = qkv + B * qkv_size;
  float *inner = y + B * H * D, *angles = inner + B * m.inner, *weights = angles + B * D;
  const int64_t page_stride = K * D * PAGE;
#pragma omp parallel num_threads(s.threads)
  {
#ifdef _OPENMP
    float* own_weights = weights + omp_get_thread_num() * s.width * PAGE;
#else
    float* own_weights = weights;
#endif
    if (m.frequencies) {
#pragma omp for
      for (int64_t r = 0; r < B; r++)
        for (int64_t i = 0; i < D / 2; i++) {
          float angle = float(s.position[r]) * m.frequencies[i];
          angles[r * D + i] = std::cos(angle);
          angles[r * D + D / 2 + i] = std::sin(angle);
        }
    }
    for (int64_t l = 0; l < m.n_layer; l++) {
      const Layer& layer = m.layers[l];
      W *keys = (W*)s.keys + l * s.pages * page_stride, *values = (W*)s.values + l * s.pages * page_stride;
#pragma omp for
      for (int64_t r = 0; r < B; r++) normalize(layer.norm1, s.x + r * C, h + r * C, C);
      each_part(layer.qkv, B, h, room, [&](const float* p, int64_t r, int64_t first, int64_t n) {
        std::memcpy(qkv + r * qkv_size + first, p, n * sizeof(float));
      });
#pragma omp for
      for (int64_t head = 0; head < B * (H + 2 * K); head++) {
        int64_t r = head / (H + 2 * K), n = head % (H + 2 * K), at = s.position[r], kv = n < H + K ? n - H : n - H - K;
        float *x = qkv + r * qkv_size + n * D, *cos = angles + r * D;
        if (n < H + K) {
          const Norm& norm = n < H ? layer.q_norm : layer.k_norm;
          if (norm.weight) normalize(norm, x, x, D);
          if (layer.rotates) rotate(x, cos, cos + D / 2, D);
        }
        if (n < H) {
          for (int64_t d = 0; d < D; d++) x[d] *= 1.0f / std::sqrt(float(D));
          continue;
        }
        W* page = (n < H + K ? keys : values) + s.table[r * s.width + at / PAGE] * page_stride + kv * D * PAGE;
        for (int64_t d = 0; d < D; d++) put(n < H + K ? page + d * PAGE + at % PAGE : page + at % PAGE * D + d, x[d]);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t head = 0; head < B * H; head++) {
        int64_t r = head / H, n = head % H, kv = n / (H / K) * D * PAGE;
        attend(qkv + r * qkv_size + n * D, keys + kv, values + kv, s.table + r * s.width, page_stride, s.position[r], D,
               own_weights, y + (r * H + n) * D);
      }
      auto add = [&](const float* p, int64_t r, int64_t first, int64_t n) {
        for (int64_t j = 0; j < n; j++) s.x[r * C + first + j] += p[j];
      };
      each_part(layer.o, B, y, room, add);
#pragma omp for
      for (int64_t r = 0; r < B; r++) normalize(layer.norm2, s.x + r * C, h + r * C, C);
      const Matrix* gate = layer.gate.panels ? &layer.gate : nullptr;
      each_part(layer.up, gate, m.activation, B, h, room, [&](const float* p, int64_t r, int64_t first, int64_t n) {
        std::memcpy(inner + r * m.inner + first, p, n * sizeof(float));
      });
      each_part(layer.down, B, inner, room, add);
    }
  }
}

extern "C" void step(const Model* m, const Step* s) {
  if (m->cache_kind == FLOAT) run<float>(*m, *s);
  else run<bfloat16>(*m, *s);
}

// Logits (B, vocabulary) of hidden states x (B, C).
extern "C" void logits(const Model* m, int64_t rows, const float* x, float* scratch, float* out, int64_t threads) {
  const int64_t C = m->channels, V = m->head.outputs;
  float* h = scratch + rounded_size(*m, rows);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t r = 0; r < rows; r++) normalize(m->norm, x + r * C, h + r * C, C);
    each_part(m->head, rows, h, scratch, [&](const float* p, int64_t r, int64_t first, int64_t n) {
      std::memcpy(out + r * V + first, p, n * sizeof(float));
    });
  }
}
