// Paged attention and the KV write for AVX-512 CPUs, as XLA FFI handlers that run on XLA's own thread pool.
//
// One task is some queries of one row on one KV head. It walks the row's keys in tiles of 64: scores and weighted values
// are two small matrix products, and the softmax between them is online. For many queries the tile's keys are first
// transposed (and widened to float32) into a buffer in L1; for few, as in decoding, that would cost more than the
// products, so each score is a dot product, sixteen at a time.
// bfloat16 queries and pools are not widened: where the CPU has AMX they take its tile products, else where it has
// AVX-512 BF16 the products of pairs.
// Reads touch exactly the keys attended: nothing past a row's length is ever loaded.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../parallel_for.h"
#include "../sums.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kTile = 64;        // keys per tile: four vectors of scores
constexpr int kMaxHeadDim = 256;
constexpr int kMaxRows = 96;     // query tokens times query heads of one task
constexpr int kFewRows = 8;      // up to so many, scores are dot products
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// ---- storage types -------------------------------------------------------------------------------------------------

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };
struct F8E4M3 { uint8_t bits; };
struct F8E5M2 { uint8_t bits; };

inline __m512 Load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 Load16(const BF16* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m512 Load16(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512 Load16(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline __m512 Load16(const F8E5M2* p) {  // the upper half of a float16
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(x, 8));
}
inline __m512 Load16(const F8E4M3* p) {  // a float16 with its exponent bias 8 too low
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7);
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.0f));
}

inline void Store16(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
inline void Store16(F16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void Store16(BF16* p, __m512 x) {  // round to nearest even; the values are finite
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// exp(x) for x <= 0, to 2 ulp or so; 0 for -inf.
inline __m512 Exp(__m512 x) {
  const __m512 y = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f)), _mm512_set1_ps(-160.0f));
  const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(y, whole);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// cap * tanh(x / cap)
inline __m512 SoftCap(__m512 x, float cap) {
  const __m512 twice = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2.0f / cap));
  const __m512 e = Exp(twice);
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 t = _mm512_mul_ps(_mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e)), _mm512_set1_ps(cap));
  return _mm512_mask_sub_ps(t, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps(), t);
}

// C[MR, NV*16] (+)= A[MR, depth] B[depth, NV*16], all float32 and row-major.
template <int MR, int NV, bool kAdd>
inline void Micro(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int depth) {
  __m512 sum[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) sum[i][j] = kAdd ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
  for (int d = 0; d < depth; ++d) {
    __m512 row[NV];
    for (int j = 0; j < NV; ++j) row[j] = _mm512_loadu_ps(b + d * ldb + 16 * j);
    for (int i = 0; i < MR; ++i) {
      const __m512 x = _mm512_set1_ps(a[i * lda + d]);
      for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_fmadd_ps(x, row[j], sum[i][j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
}

template <int NV, bool kAdd>
void Rows(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int rows, int depth) {
  int i = 0;
  for (; i + 6 <= rows; i += 6) Micro<6, NV, kAdd>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth);
  a += i * lda;
  c += i * ldc;
  switch (rows - i) {
    case 1: return Micro<1, NV, kAdd>(a, lda, b, ldb, c, ldc, depth);
    case 2: return Micro<2, NV, kAdd>(a, lda, b, ldb, c, ldc, depth);
    case 3: return Micro<3, NV, kAdd>(a, lda, b, ldb, c, ldc, depth);
    case 4: return Micro<4, NV, kAdd>(a, lda, b, ldb, c, ldc, depth);
    case 5: return Micro<5, NV, kAdd>(a, lda, b, ldb, c, ldc, depth);
  }
}

// C[rows, columns] += A[rows, depth] B[depth, columns]; columns is a multiple of 16.
void AddProduct(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int rows, int depth, int columns) {
  int j = 0;
  for (; j + 64 <= columns; j += 64) Rows<4, true>(a, lda, b + j, ldb, c + j, ldc, rows, depth);
  switch ((columns - j) / 16) {
    case 1: return Rows<1, true>(a, lda, b + j, ldb, c + j, ldc, rows, depth);
    case 2: return Rows<2, true>(a, lda, b + j, ldb, c + j, ldc, rows, depth);
    case 3: return Rows<3, true>(a, lda, b + j, ldb, c + j, ldc, rows, depth);
  }
}

// Transposes 16 vectors in place.
inline void Transpose16(__m512 r[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(t[i + j]), high = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88), d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// ---- attention -----------------------------------------------------------------------------------------------------

struct Attention {
  int64_t tokens, rows, pages, max_pages;
  int q_heads, kv_heads, group, head_dim, page_size;
  float scale, soft_cap;  // soft_cap 0: none
  int window;             // 0: none
  const void *q, *k, *v;
  const float *k_scale, *v_scale;  // null where the pools are not quantized
  const int32_t *table, *lengths, *starts;
  void* out;
  float* lse;
};

struct Task {
  int row, head;
  int first, count;  // query tokens, as indices into q
  int position;      // of the first query
};

struct alignas(64) Scratch {
  float q[kMaxRows * kMaxHeadDim];
  float out[kMaxRows * kMaxHeadDim];
  float scores[kMaxRows * kTile];
  float keys[kMaxHeadDim * kTile];    // transposed: [head_dim, kTile]
  float values[kTile * kMaxHeadDim];  // widened; unused for float32 pools
  float peak[kMaxRows], total[kMaxRows];
  // The same in bfloat16, keys and values with pairs of their contracted axis interleaved.
  uint16_t q16[kMaxRows * kMaxHeadDim];
  uint16_t weights16[kMaxRows * kTile];
  uint32_t keys16[kMaxHeadDim / 2 * kTile];    // [head_dim / 2, kTile, 2]
  uint32_t values16[kTile / 2 * kMaxHeadDim];  // [kTile / 2, head_dim, 2]
};

template <typename KV>
struct Segment {  // consecutive keys of a tile that lie in one page
  int offset, count;
  const KV *k, *v;
  const float *k_scale, *v_scale;
};

// Prefetches the next tile a few lines at a time, between the arithmetic of this one: in one burst it would stall.
template <typename KV>
struct Ahead {
  Segment<KV> segments[kTile];
  int count = 0, current = 0;
  int64_t at = 0;

  void Fetch(int head_dim) {
    if (current == count) return;
    const Segment<KV>& s = segments[current];
    const int lines = 4 * sizeof(KV);  // of keys and of values, per block of 16 keys by 64 bytes or more
    for (int i = 0; i < lines; ++i, at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(s.k) + at, _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(s.v) + at, _MM_HINT_T1);
    }
    if (at >= int64_t{s.count} * head_dim * static_cast<int>(sizeof(KV))) ++current, at = 0;
  }
};

template <typename KV>
void PackKeys(const Segment<KV>& s, int head_dim, float* keys, Ahead<KV>& ahead) {
  for (int t = 0; t < s.count; t += 16) {
    const int n = std::min(16, s.count - t);
    for (int d = 0; d < head_dim; d += 16) {
      __m512 r[16];
      for (int i = 0; i < 16; ++i) {
        r[i] = i < n ? Load16(s.k + (t + i) * head_dim + d) : _mm512_setzero_ps();
        if (s.k_scale != nullptr && i < n) r[i] = _mm512_mul_ps(r[i], _mm512_set1_ps(s.k_scale[t + i]));
      }
      Transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(keys + (d + i) * kTile + s.offset + t, r[i]);
      ahead.Fetch(head_dim);
    }
  }
}

// What multiplies: float32 lanes, bfloat16 pairs, or AMX tiles of bfloat16 pairs.
enum class Unit { kLanes, kPairs, kTiles };

template <Unit kUnit>
struct Dot {
  static constexpr int kStep = 16;
  template <typename T>
  static __m512 Load(const T* p) { return Load16(p); }
  static __m512 MultiplyAdd(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Dot<Unit::kPairs> {
  static constexpr int kStep = 32;
  static __m512bh Load(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512 MultiplyAdd(__m512 sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

// Scores of MR <= 4 queries with a segment's keys, four keys at a time; a last group repeats its last key.
template <Unit kUnit, int MR, typename Q, typename KV>
void DotKeys(const Q* q, const Segment<KV>& s, int head_dim, float* scores, Ahead<KV>& ahead) {
  using D = Dot<kUnit>;
  for (int t = 0; t < s.count; t += 4) {
    const int n = std::min(4, s.count - t);
    const KV* key[4];
    for (int c = 0; c < 4; ++c) key[c] = s.k + (t + std::min(c, n - 1)) * head_dim;
    __m512 sums[16];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (int d = 0; d < head_dim; d += D::kStep) {
      decltype(D::Load(q)) x[MR];
      for (int r = 0; r < MR; ++r) x[r] = D::Load(q + r * head_dim + d);
      for (int c = 0; c < 4; ++c) {
        const auto k = D::Load(key[c] + d);
        for (int r = 0; r < MR; ++r) sums[r * 4 + c] = D::MultiplyAdd(sums[r * 4 + c], k, x[r]);
      }
      if (d % 64 == 0) ahead.Fetch(head_dim);
    }
    alignas(64) float dots[16];
    _mm512_store_ps(dots, halfmoon::Sums(sums));
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < n; ++c)
        scores[r * kTile + s.offset + t + c] = dots[r * 4 + c] * (s.k_scale != nullptr ? s.k_scale[t + c] : 1.0f);
  }
}

template <Unit kUnit, typename Q, typename KV>
void DotKeys(const Q* q, const Segment<KV>& s, int head_dim, float* scores, int rows, Ahead<KV>& ahead) {
  for (; rows >= 4; rows -= 4, q += 4 * head_dim, scores += 4 * kTile)
    DotKeys<kUnit, 4>(q, s, head_dim, scores, ahead);
  switch (rows) {
    case 1: return DotKeys<kUnit, 1>(q, s, head_dim, scores, ahead);
    case 2: return DotKeys<kUnit, 2>(q, s, head_dim, scores, ahead);
    case 3: return DotKeys<kUnit, 3>(q, s, head_dim, scores, ahead);
  }
}

template <typename KV>
void WidenValues(const Segment<KV>& s, int head_dim, float* values) {
  for (int t = 0; t < s.count; ++t) {
    const __m512 scale = _mm512_set1_ps(s.v_scale != nullptr ? s.v_scale[t] : 1.0f);
    for (int d = 0; d < head_dim; d += 16)
      _mm512_storeu_ps(values + (s.offset + t) * head_dim + d, _mm512_mul_ps(Load16(s.v + t * head_dim + d), scale));
  }
}

// The pieces, page by page, of keys [from, to) of a row.
template <typename KV>
int Segments(const Attention& a, const Task& task, int from, int to, Segment<KV>* segments) {
  int n = 0;
  for (int key = from; key < to;) {
    const int slot = key % a.page_size;
    const int64_t page = std::clamp<int64_t>(a.table[task.row * a.max_pages + key / a.page_size], 0, a.pages - 1);
    const int64_t at = (page * a.kv_heads + task.head) * a.page_size + slot;
    const int count = std::min(a.page_size - slot, to - key);
    segments[n++] = {key - from,
                     count,
                     static_cast<const KV*>(a.k) + at * a.head_dim,
                     static_cast<const KV*>(a.v) + at * a.head_dim,
                     a.k_scale != nullptr ? a.k_scale + at : nullptr,
                     a.v_scale != nullptr ? a.v_scale + at : nullptr};
    key += count;
  }
  return n;
}

// Softmax of one query over keys [low, high) of a tile: scores become weights (those outside, 0), and the query's
// running state is brought up to date.
inline void Weigh(const Attention& a, float* scores, float* out, float& peak, float& total, int low, int high) {
  __m512 s[4];
  __mmask16 seen[4];
  __m512 most = _mm512_set1_ps(kNothing);
  for (int j = 0; j < 4; ++j) {
    const int first = std::clamp(low - 16 * j, 0, 16), last = std::clamp(high - 16 * j, 0, 16);
    seen[j] = static_cast<__mmask16>(((1u << last) - 1) & ~((1u << first) - 1));
    s[j] = _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * j), _mm512_set1_ps(a.scale));
    if (a.soft_cap > 0) s[j] = SoftCap(s[j], a.soft_cap);
    most = _mm512_mask_max_ps(most, seen[j], most, s[j]);
  }
  const float new_peak = std::max(peak, _mm512_reduce_max_ps(most));
  const float base = new_peak == kNothing ? 0.0f : new_peak;
  __m512 sum = _mm512_setzero_ps();
  for (int j = 0; j < 4; ++j) {
    const __m512 w = _mm512_maskz_mov_ps(seen[j], Exp(_mm512_sub_ps(s[j], _mm512_set1_ps(base))));
    _mm512_storeu_ps(scores + 16 * j, w);
    sum = _mm512_add_ps(sum, w);
  }
  if (new_peak != peak) {
    const float decay = std::exp(peak - base);
    total *= decay;
    const __m512 factor = _mm512_set1_ps(decay);
    for (int d = 0; d < a.head_dim; d += 16) _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(out + d), factor));
    peak = new_peak;
  }
  total += _mm512_reduce_add_ps(sum);
}

inline void WeighTile(const Attention& a, const Task& task, int from, int to, Scratch& x) {
  for (int i = 0; i < task.count * a.group; ++i) {
    const int position = task.position + i / a.group;
    const int low = a.window > 0 ? position - a.window + 1 - from : 0;
    const int high = std::min(position + 1, to) - from;
    Weigh(a, x.scores + i * kTile, x.out + i * a.head_dim, x.peak[i], x.total[i], low, high);
  }
}

template <typename KV>
void AttendTile(const Attention& a, const Task& task, int from, int to, Ahead<KV>& ahead, Scratch& x) {
  Segment<KV> segments[kTile];
  const int n = Segments(a, task, from, to, segments);
  const int rows = task.count * a.group;
  if (rows <= kFewRows) {
    for (int i = 0; i < n; ++i) DotKeys<Unit::kLanes>(x.q, segments[i], a.head_dim, x.scores, rows, ahead);
  } else {
    for (int i = 0; i < n; ++i) PackKeys(segments[i], a.head_dim, x.keys, ahead);
    Rows<4, false>(x.q, a.head_dim, x.keys, kTile, x.scores, kTile, rows, a.head_dim);
  }
  WeighTile(a, task, from, to, x);
  for (int i = 0; i < n; ++i) {
    const Segment<KV>& s = segments[i];
    const float* values;
    if constexpr (std::is_same_v<KV, float>) {
      values = s.v;
    } else {
      WidenValues(s, a.head_dim, x.values);
      values = x.values + s.offset * a.head_dim;
    }
    AddProduct(x.scores + s.offset, kTile, values, a.head_dim, x.out, a.head_dim, rows, s.count, a.head_dim);
  }
}

// ---- bfloat16 in pairs ----------------------------------------------------------------------------------------------

#ifdef __AVX512BF16__

// C[MR, 64] (+)= A[MR, depth] B[depth, 64], B with pairs of rows interleaved; strides in elements, depth even.
template <int MR, bool kAdd>
inline void PairMicro(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int depth) {
  __m512 sum[MR][4];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) sum[i][j] = kAdd ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
  for (int d = 0; d < depth; d += 2, b += ldb) {
    __m512bh row[4];
    for (int j = 0; j < 4; ++j) row[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
    for (int i = 0; i < MR; ++i) {
      int pair;
      std::memcpy(&pair, a + i * lda + d, sizeof(pair));
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, row[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
}

template <bool kAdd>
void PairProduct(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int depth) {
  depth += depth & 1;
  int i = 0;
  for (; i + 6 <= rows; i += 6) PairMicro<6, kAdd>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth);
  a += i * lda;
  c += i * ldc;
  switch (rows - i) {
    case 1: return PairMicro<1, kAdd>(a, lda, b, ldb, c, ldc, depth);
    case 2: return PairMicro<2, kAdd>(a, lda, b, ldb, c, ldc, depth);
    case 3: return PairMicro<3, kAdd>(a, lda, b, ldb, c, ldc, depth);
    case 4: return PairMicro<4, kAdd>(a, lda, b, ldb, c, ldc, depth);
    case 5: return PairMicro<5, kAdd>(a, lda, b, ldb, c, ldc, depth);
  }
}

#endif

#ifdef __AMX_BF16__

// Whether the kernel lets this process use the tile registers.
bool HasAmx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 hold sums [rows, 16] float32, tile 4 the left factor [rows, 32], tile 5 the right one [16, 16, 2].
void ConfigureTiles(int rows) {
  TileShapes shapes;
  for (int i = 0; i < 6; ++i) {
    shapes.bytes_per_row[i] = 64;
    shapes.rows[i] = i == 5 ? 16 : rows;
  }
  _tile_loadconfig(&shapes);
}

// The same for the rows of one tile.
template <bool kAdd>
void TileMicro(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int depth) {
  if (kAdd) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16, ldc * 4);
    _tile_loadd(2, c + 32, ldc * 4);
    _tile_loadd(3, c + 48, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int d = 0; d < depth; d += 32) {
    const uint32_t* row = b + d / 2 * ldb;
    _tile_loadd(4, a + d, lda * 2);
    _tile_loadd(5, row, ldb * 4);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, row + 16, ldb * 4);
    _tile_dpbf16ps(1, 4, 5);
    _tile_loadd(5, row + 32, ldb * 4);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(5, row + 48, ldb * 4);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  _tile_stored(2, c + 32, ldc * 4);
  _tile_stored(3, c + 48, ldc * 4);
}

template <bool kAdd>
void TileProduct(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int depth) {
  for (int i = 0; i < rows; i += 16) TileMicro<kAdd>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth);
}

#endif

#ifdef __AVX512BF16__

template <Unit kUnit, bool kAdd, typename... Args>
inline void Product(Args... args) {
#ifdef __AMX_BF16__
  if constexpr (kUnit == Unit::kTiles) return TileProduct<kAdd>(args...);
#endif
#ifdef __AVX512BF16__
  if constexpr (kUnit == Unit::kPairs) return PairProduct<kAdd>(args...);
#endif
}

void InterleaveKeys(const Segment<BF16>& s, int head_dim, uint32_t* keys, Ahead<BF16>& ahead) {
  for (int t = 0; t < s.count; t += 16) {
    for (int d = 0; d < head_dim; d += 32) {
      __m512 r[16];  // 32 numbers of each of 16 keys, moved in pairs
      for (int i = 0; i < 16; ++i)
        r[i] = t + i < s.count ? _mm512_loadu_ps(s.k + (t + i) * head_dim + d) : _mm512_setzero_ps();
      Transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(keys + (d / 2 + i) * kTile + s.offset + t, r[i]);
      ahead.Fetch(head_dim);
      ahead.Fetch(head_dim);
    }
  }
}

void InterleaveValues(const Segment<BF16>& s, int head_dim, uint32_t* values) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i low_index = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(32)), 16));
  const __m512i high_index = _mm512_add_epi16(low_index, _mm512_set1_epi16(16));
  for (int t = 0; t < s.count; t += 2) {
    uint32_t* pair = values + (s.offset + t) / 2 * head_dim;
    for (int d = 0; d < head_dim; d += 32) {
      const __m512i x = _mm512_loadu_si512(s.v + t * head_dim + d);
      const __m512i y = t + 1 < s.count ? _mm512_loadu_si512(s.v + (t + 1) * head_dim + d) : _mm512_setzero_si512();
      _mm512_storeu_si512(pair + d, _mm512_permutex2var_epi16(x, low_index, y));
      _mm512_storeu_si512(pair + d + 16, _mm512_permutex2var_epi16(x, high_index, y));
    }
  }
}

template <Unit kUnit>
void AttendTilePairs(const Attention& a, const Task& task, int from, int to, Ahead<BF16>& ahead, Scratch& x) {
  Segment<BF16> segments[kTile];
  const int n = Segments(a, task, from, to, segments);
  const int rows = task.count * a.group, dim = a.head_dim, keys = to - from;
  if (kUnit == Unit::kPairs && rows <= kFewRows) {
    for (int i = 0; i < n; ++i) DotKeys<Unit::kPairs>(x.q16, segments[i], dim, x.scores, rows, ahead);
  } else {
    for (int i = 0; i < n; ++i) InterleaveKeys(segments[i], dim, x.keys16, ahead);
    Product<kUnit, false>(x.q16, dim, x.keys16, kTile, x.scores, kTile, rows, dim);
  }
  WeighTile(a, task, from, to, x);
  for (int i = 0; i < rows * kTile; i += 16)
    Store16(reinterpret_cast<BF16*>(x.weights16 + i), _mm512_loadu_ps(x.scores + i));
  for (int i = 0; i < n; ++i) InterleaveValues(segments[i], dim, x.values16);
  // Weights past the last key are 0, but what they multiply must be finite.
  std::fill(x.values16 + (keys + 1) / 2 * dim, x.values16 + (keys + 31) / 32 * 16 * dim, 0);
  for (int d = 0; d < dim; d += 64)
    Product<kUnit, true>(x.weights16, kTile, x.values16 + d, dim, x.out + d, dim, rows, keys);
}

#endif

template <typename Q, typename KV, Unit kUnit = Unit::kLanes>
void Attend(const Attention& a, const Task& task) {
  thread_local std::unique_ptr<Scratch> scratch = std::make_unique<Scratch>();
  Scratch& x = *scratch;
  const int rows = task.count * a.group, dim = a.head_dim;
  const auto at = [&](int i) {  // where query row i lives in q and out, in heads
    return int64_t{task.first + i / a.group} * a.q_heads + task.head * a.group + i % a.group;
  };
  for (int i = 0; i < rows; ++i) {
    const Q* q = static_cast<const Q*>(a.q) + at(i) * dim;
    for (int d = 0; d < dim; d += 16) {
      if constexpr (kUnit == Unit::kLanes) _mm512_storeu_ps(x.q + i * dim + d, Load16(q + d));
      _mm512_storeu_ps(x.out + i * dim + d, _mm512_setzero_ps());
    }
    if constexpr (kUnit != Unit::kLanes) std::memcpy(x.q16 + i * dim, q, dim * sizeof(Q));
    x.peak[i] = kNothing;
    x.total[i] = 0;
  }
#ifdef __AMX_BF16__
  if constexpr (kUnit == Unit::kTiles) ConfigureTiles(std::min(rows, 16));
#endif
  const int stop = task.position + task.count;
  const int begin = a.window > 0 ? std::max(0, task.position - a.window + 1) / kTile * kTile : 0;
  for (int from = begin; from < stop; from += kTile) {
    Ahead<KV> ahead;
    if (from + kTile < stop)
      ahead.count = Segments(a, task, from + kTile, std::min(from + 2 * kTile, stop), ahead.segments);
#ifdef __AVX512BF16__
    if constexpr (kUnit != Unit::kLanes) {
      AttendTilePairs<kUnit>(a, task, from, std::min(from + kTile, stop), ahead, x);
      continue;
    }
#endif
    AttendTile<KV>(a, task, from, std::min(from + kTile, stop), ahead, x);
  }
#ifdef __AMX_BF16__
  if constexpr (kUnit == Unit::kTiles) _tile_release();
#endif
  for (int i = 0; i < rows; ++i) {
    const float total = x.total[i];
    const __m512 norm = _mm512_set1_ps(total > 0 ? 1.0f / total : 0.0f);
    Q* out = static_cast<Q*>(a.out) + at(i) * dim;
    for (int d = 0; d < dim; d += 16) Store16(out + d, _mm512_mul_ps(_mm512_loadu_ps(x.out + i * dim + d), norm));
    a.lse[at(i)] = total > 0 ? x.peak[i] + std::log(total) : kNothing;
  }
}

std::vector<Task> Tasks(const Attention& a) {
  const int most = std::max(1, kMaxRows / a.group);
  std::vector<Task> tasks;
  for (int row = 0; row < a.rows; ++row) {
    const int start = a.starts[row], stop = std::min<int64_t>(a.starts[row + 1], a.tokens);
    for (int first = start; first < stop; first += most)
      for (int head = 0; head < a.kv_heads; ++head)
        tasks.push_back({row, head, first, std::min(most, stop - first), a.lengths[row] - a.starts[row + 1] + first});
  }
  // The longest first: they must not be left over at the end.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) {
    return int64_t{x.position + x.count} * x.count > int64_t{y.position + y.count} * y.count;
  });
  return tasks;
}

using Kernel = void (*)(const Attention&, const Task&);

template <typename Q>
Kernel PickKernel(ffi::DataType kv) {
  switch (kv) {
    case ffi::DataType::F32: return Attend<Q, float>;
    case ffi::DataType::BF16: return Attend<Q, BF16>;
    case ffi::DataType::F16: return Attend<Q, F16>;
    case ffi::DataType::S8: return Attend<Q, int8_t>;
    case ffi::DataType::F8E4M3FN: return Attend<Q, F8E4M3>;
    case ffi::DataType::F8E5M2: return Attend<Q, F8E5M2>;
    default: return nullptr;
  }
}

Kernel PickKernel(ffi::DataType q, ffi::DataType kv, int head_dim) {
  if (q == ffi::DataType::BF16 && kv == ffi::DataType::BF16 && head_dim % 64 == 0) {
#ifdef __AMX_BF16__
    if (HasAmx()) return Attend<BF16, BF16, Unit::kTiles>;
#endif
#ifdef __AVX512BF16__
    return Attend<BF16, BF16, Unit::kPairs>;
#endif
  }
  switch (q) {
    case ffi::DataType::F32: return PickKernel<float>(kv);
    case ffi::DataType::BF16: return PickKernel<BF16>(kv);
    case ffi::DataType::F16: return PickKernel<F16>(kv);
    default: return nullptr;
  }
}

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                          ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> v_scale,
                          ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> starts,
                          ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::F32>> lse, float scale,
                          float soft_cap, int32_t window) {
  const auto qd = q.dimensions(), kd = k.dimensions(), td = table.dimensions();
  Attention a;
  a.tokens = qd[0], a.q_heads = qd[1], a.head_dim = qd[2];
  a.pages = kd[0], a.kv_heads = kd[1], a.page_size = kd[2];
  a.rows = td[0], a.max_pages = td[1], a.group = a.q_heads / a.kv_heads;
  a.scale = scale, a.soft_cap = soft_cap, a.window = window;
  a.q = q.untyped_data(), a.k = k.untyped_data(), a.v = v.untyped_data();
  a.k_scale = k_scale.element_count() ? k_scale.typed_data() : nullptr;
  a.v_scale = v_scale.element_count() ? v_scale.typed_data() : nullptr;
  a.table = table.typed_data(), a.lengths = lengths.typed_data(), a.starts = starts.typed_data();
  a.out = out->untyped_data(), a.lse = lse->typed_data();

  const Kernel kernel = PickKernel(q.element_type(), k.element_type(), a.head_dim);
  if (kernel == nullptr) return ffi::Error::InvalidArgument("paged attention: unsupported dtype");
  if (a.head_dim % 16 || a.head_dim > kMaxHeadDim || a.page_size % 16 || a.group > kMaxRows)
    return ffi::Error::InvalidArgument("paged attention: unsupported shape");
  int64_t keys = 0;
  for (int row = 0; row < a.rows; ++row) {
    keys += int64_t{a.lengths[row]} * std::max(0, a.starts[row + 1] - a.starts[row]);
    if (a.starts[row] < 0 || a.starts[row + 1] < a.starts[row] || a.lengths[row] > a.max_pages * a.page_size)
      return ffi::Error::InvalidArgument("paged attention: query_starts decrease, or a length exceeds its page table");
  }
  const int64_t owned = std::min<int64_t>(a.starts[a.rows], a.tokens);
  std::memset(static_cast<char*>(a.out) + owned * (out->size_bytes() / std::max<int64_t>(a.tokens, 1)), 0,
              (a.tokens - owned) * (out->size_bytes() / std::max<int64_t>(a.tokens, 1)));
  std::fill(a.lse + owned * a.q_heads, a.lse + a.tokens * a.q_heads, kNothing);

  const std::vector<Task> tasks = Tasks(a);
  // Waking a thread costs some microseconds: not for less than about 50 microseconds of work.
  const int threads = keys * a.q_heads * a.head_dim > (1 << 20) ? pool.num_threads() : 1;
  halfmoon::ParallelFor(pool, threads, tasks.size(), [&](int i) { kernel(a, tasks[i]); });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(HalfmoonPagedAttention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int32_t>("window"));

// ---- KV write ------------------------------------------------------------------------------------------------------

// pool [pages, kv_heads, page_size, ...] and x [tokens, kv_heads, ...] of one dtype; the result aliases the pool.
ffi::Error Write(ffi::AnyBuffer pool, ffi::AnyBuffer x, const int32_t* slots, ffi::Result<ffi::AnyBuffer>& result) {
  const auto pd = pool.dimensions(), xd = x.dimensions();
  const int64_t pages = pd[0], heads = pd[1], page_size = pd[2];
  char* base = static_cast<char*>(result->untyped_data());
  if (base != pool.untyped_data()) return ffi::Error::Internal("KV write: the pool was not aliased");
  const size_t bytes = pool.size_bytes() / std::max<int64_t>(pages * heads * page_size, 1);
  const char* from = static_cast<const char*>(x.untyped_data());
  for (int64_t t = 0; t < xd[0]; ++t) {
    const int64_t slot = slots[t];
    if (slot < 0 || slot >= pages * page_size) continue;
    const int64_t page = slot / page_size, offset = slot % page_size;
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(base + ((page * heads + h) * page_size + offset) * bytes, from + (t * heads + h) * bytes, bytes);
  }
  return ffi::Error::Success();
}

ffi::Error WriteKV(ffi::AnyBuffer cache_k, ffi::AnyBuffer cache_v, ffi::AnyBuffer k, ffi::AnyBuffer v,
                   ffi::Buffer<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> new_k, ffi::Result<ffi::AnyBuffer> new_v) {
  ffi::Error error = Write(cache_k, k, slots.typed_data(), new_k);
  return error.failure() ? error : Write(cache_v, v, slots.typed_data(), new_v);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(HalfmoonWriteKV, WriteKV,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace
