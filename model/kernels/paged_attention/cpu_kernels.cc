// Paged attention and the KV write for CPUs, as XLA FFI handlers that run on XLA's own thread pool.
//
// One task is some queries of one row on one KV head. It walks the row's keys in tiles of 64: scores and weighted values
// are two small matrix products, and the softmax between them is online. For many queries the tile's keys are first
// transposed (and widened to float32) into a buffer in L1; for few, as in decoding, that would cost more than the
// products, so each score is a dot product, as many at a time as a vector has lanes.
// bfloat16 queries and pools are not widened where the CPU can multiply them: with AMX they take its tile products, with
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
#include "../simd.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using halfmoon::BF16;
using halfmoon::F16;
using halfmoon::F8E4M3;
using halfmoon::F8E5M2;
using halfmoon::Fill;
using halfmoon::Floats;
using halfmoon::kLanes;
using halfmoon::Load;
using halfmoon::Mask;
using halfmoon::Mul;
using halfmoon::MultiplyAdd;
using halfmoon::Store;
using halfmoon::Zero;

constexpr int kTile = 64;        // keys per tile
constexpr int kMaxHeadDim = 256;
constexpr int kMaxRows = 96;     // query tokens times query heads of one task
constexpr int kFewRows = 8;      // up to so many, scores are dot products
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// ---- products ------------------------------------------------------------------------------------------------------

// Vectors of sums that stay in registers, beside a broadcast and what it multiplies.
constexpr int kSums = halfmoon::kRegisters * 3 / 4;

// How many of NV vectors of each of `rows` rows are summed at a time: the largest divisor that fits.
constexpr int SumsPerRow(int rows, int vectors, int most = kSums) {
  return vectors % most == 0 && rows * most <= kSums ? most : SumsPerRow(rows, vectors, most - 1);
}

// Prefetches kBytes from p on; harmless past the end of a buffer.
template <int kBytes>
inline void Prefetch(const void* p) {
  for (int i = 0; i < kBytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T0);
}

// C[MR, NV*kLanes] (+)= A[MR, depth] B[depth, NV*kLanes], all row-major, A and C float32. With kAhead as much memory as
// B takes is prefetched from `ahead` on.
template <int MR, int NV, bool kAdd, bool kAhead, typename T>
inline void Micro(const float* a, int lda, const T* b, int ldb, float* c, int ldc, int depth, const T* ahead) {
  constexpr int kPart = SumsPerRow(MR, NV);
  if constexpr (kPart < NV) {
    for (int j = 0; j < NV * kLanes; j += kPart * kLanes)
      Micro<MR, kPart, kAdd, kAhead>(a, lda, b + j, ldb, c + j, ldc, depth, ahead + j * depth);
    return;
  }
  Floats sum[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) sum[i][j] = kAdd ? Load(c + i * ldc + kLanes * j) : Zero();
  for (int d = 0; d < depth; ++d) {
    Floats row[NV];
    for (int j = 0; j < NV; ++j) row[j] = Load(b + d * ldb + kLanes * j);
    if constexpr (kAhead) Prefetch<NV * kLanes * sizeof(T)>(ahead + d * NV * kLanes);
    for (int i = 0; i < MR; ++i) {
      const Floats x = Fill(a[i * lda + d]);
      for (int j = 0; j < NV; ++j) sum[i][j] = MultiplyAdd(x, row[j], sum[i][j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) Store(c + i * ldc + kLanes * j, sum[i][j]);
}

template <int NV, bool kAdd, bool kAhead, typename T>
void Rows(const float* a, int lda, const T* b, int ldb, float* c, int ldc, int rows, int depth, const T* ahead) {
  int i = 0;
  for (; i + 6 <= rows; i += 6)
    Micro<6, NV, kAdd, kAhead>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, ahead);
  a += i * lda;
  c += i * ldc;
  switch (rows - i) {
    case 1: return Micro<1, NV, kAdd, kAhead>(a, lda, b, ldb, c, ldc, depth, ahead);
    case 2: return Micro<2, NV, kAdd, kAhead>(a, lda, b, ldb, c, ldc, depth, ahead);
    case 3: return Micro<3, NV, kAdd, kAhead>(a, lda, b, ldb, c, ldc, depth, ahead);
    case 4: return Micro<4, NV, kAdd, kAhead>(a, lda, b, ldb, c, ldc, depth, ahead);
    case 5: return Micro<5, NV, kAdd, kAhead>(a, lda, b, ldb, c, ldc, depth, ahead);
  }
}

// C[rows, columns] += A[rows, depth] B[depth, columns]; columns is a multiple of 16.
template <bool kAhead, typename T>
void AddProduct(const float* a, int lda, const T* b, int ldb, float* c, int ldc, int rows, int depth, int columns,
                const T* ahead) {
  int j = 0;
  for (; j + 64 <= columns; j += 64)
    Rows<64 / kLanes, true, kAhead>(a, lda, b + j, ldb, c + j, ldc, rows, depth, ahead + j * depth);
  b += j, c += j, ahead += j * depth;
  switch ((columns - j) / 16) {
    case 1: return Rows<16 / kLanes, true, kAhead>(a, lda, b, ldb, c, ldc, rows, depth, ahead);
    case 2: return Rows<32 / kLanes, true, kAhead>(a, lda, b, ldb, c, ldc, rows, depth, ahead);
    case 3: return Rows<48 / kLanes, true, kAhead>(a, lda, b, ldb, c, ldc, rows, depth, ahead);
  }
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

// The next tile. While a segment of this one is multiplied, its like in the next is prefetched, a line or so for each
// step of the arithmetic: in a burst it would stall.
template <typename KV>
struct Ahead {
  Segment<KV> segments[kTile];
  int count = 0;

  const Segment<KV>& Like(const Segment<KV>* these, int i) const { return i < count ? segments[i] : these[i]; }
};

template <typename KV>
void PackKeys(const Segment<KV>& s, int head_dim, float* keys, const Segment<KV>& next) {
  for (int t = 0; t < s.count; t += kLanes) {
    const int n = std::min(+kLanes, s.count - t);
    for (int d = 0; d < head_dim; d += kLanes) {
      Floats r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        r[i] = i < n ? Load(s.k + (t + i) * head_dim + d) : Zero();
        if (s.k_scale != nullptr && i < n) r[i] = Mul(r[i], Fill(s.k_scale[t + i]));
      }
      halfmoon::Transpose(r);
      for (int i = 0; i < kLanes; ++i) Store(keys + (d + i) * kTile + s.offset + t, r[i]);
      Prefetch<kLanes * kLanes * sizeof(KV)>(next.k + t * head_dim + d * kLanes);
      Prefetch<kLanes * kLanes * sizeof(KV)>(next.v + t * head_dim + d * kLanes);
    }
  }
}

// What multiplies: float32 lanes, bfloat16 pairs, or AMX tiles of bfloat16 pairs.
enum class Unit { kLanes, kPairs, kTiles };

template <Unit kUnit, typename T>
inline auto LoadFactors(const T* p) {
  if constexpr (kUnit == Unit::kPairs)
    return halfmoon::LoadPairs(p);
  else
    return Load(p);
}

// Scores of MR <= 4 queries with a segment's keys, some keys at a time; a last group repeats its last key.
template <Unit kUnit, int MR, typename Q, typename KV>
void DotKeys(const Q* q, const Segment<KV>& s, int head_dim, float* scores, const KV* ahead) {
  constexpr int kStep = kUnit == Unit::kPairs ? 2 * kLanes : kLanes;
  constexpr int kKeys = 4 * MR <= kLanes ? 4 : kLanes / 4;  // a sum for each lane
  for (int t = 0; t < s.count; t += kKeys) {
    const int n = std::min(+kKeys, s.count - t);
    const KV* key[kKeys];
    for (int c = 0; c < kKeys; ++c) key[c] = s.k + (t + std::min(c, n - 1)) * head_dim;
    Floats sums[kLanes];
    for (Floats& sum : sums) sum = Zero();
    for (int d = 0; d < head_dim; d += kStep) {
      decltype(LoadFactors<kUnit>(q)) x[MR];
      for (int r = 0; r < MR; ++r) x[r] = LoadFactors<kUnit>(q + r * head_dim + d);
      for (int c = 0; c < kKeys; ++c) {
        const auto k = LoadFactors<kUnit>(key[c] + d);
        for (int r = 0; r < MR; ++r) sums[r * kKeys + c] = MultiplyAdd(k, x[r], sums[r * kKeys + c]);
      }
      Prefetch<kKeys * kStep * sizeof(KV)>(ahead + t * head_dim + d * kKeys);
    }
    alignas(64) float dots[kLanes];
    Store(dots, halfmoon::Sums(sums));
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < n; ++c)
        scores[r * kTile + s.offset + t + c] = dots[r * kKeys + c] * (s.k_scale != nullptr ? s.k_scale[t + c] : 1.0f);
  }
}

template <Unit kUnit, typename Q, typename KV>
void DotKeys(const Q* q, const Segment<KV>& s, int head_dim, float* scores, int rows, const KV* ahead) {
  for (; rows >= 4; rows -= 4, q += 4 * head_dim, scores += 4 * kTile)
    DotKeys<kUnit, 4>(q, s, head_dim, scores, ahead);
  switch (rows) {
    case 1: return DotKeys<kUnit, 1>(q, s, head_dim, scores, ahead);
    case 2: return DotKeys<kUnit, 2>(q, s, head_dim, scores, ahead);
    case 3: return DotKeys<kUnit, 3>(q, s, head_dim, scores, ahead);
  }
}

template <typename KV>
void WidenValues(const Segment<KV>& s, int head_dim, float* values, const KV* ahead) {
  for (int t = 0; t < s.count; ++t) {
    const Floats scale = Fill(s.v_scale != nullptr ? s.v_scale[t] : 1.0f);
    for (int d = 0; d < head_dim; d += kLanes) {
      Store(values + (s.offset + t) * head_dim + d, Mul(Load(s.v + t * head_dim + d), scale));
      Prefetch<kLanes * sizeof(KV)>(ahead + t * head_dim + d);
    }
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
  constexpr int kVectors = kTile / kLanes;
  Floats s[kVectors];
  Mask seen[kVectors];
  Floats most = Fill(kNothing);
  for (int j = 0; j < kVectors; ++j) {
    seen[j] = halfmoon::Between(low - kLanes * j, high - kLanes * j);
    s[j] = Mul(Load(scores + kLanes * j), Fill(a.scale));
    if (a.soft_cap > 0) s[j] = halfmoon::SoftCap(s[j], a.soft_cap);
    most = halfmoon::MaxWhere(seen[j], most, s[j]);
  }
  const float new_peak = std::max(peak, halfmoon::ReduceMax(most));
  const float base = new_peak == kNothing ? 0.0f : new_peak;
  Floats sum = Zero();
  for (int j = 0; j < kVectors; ++j) {
    const Floats w = halfmoon::Where(seen[j], halfmoon::Exp(halfmoon::Sub(s[j], Fill(base))));
    Store(scores + kLanes * j, w);
    sum = halfmoon::Add(sum, w);
  }
  if (new_peak != peak) {
    const float decay = std::exp(peak - base);
    total *= decay;
    const Floats factor = Fill(decay);
    for (int d = 0; d < a.head_dim; d += kLanes) Store(out + d, Mul(Load(out + d), factor));
    peak = new_peak;
  }
  total += halfmoon::ReduceAdd(sum);
}

inline void WeighTile(const Attention& a, const Task& task, int from, int to, Scratch& x) {
  for (int i = 0; i < task.count * a.group; ++i) {
    const int position = task.position + i / a.group;
    const int low = a.window > 0 ? position - a.window + 1 - from : 0;
    const int high = std::min(position + 1, to) - from;
    Weigh(a, x.scores + i * kTile, x.out + i * a.head_dim, x.peak[i], x.total[i], low, high);
  }
}

// Whether few queries multiply values as they load them. On AVX-512, bfloat16 does so in pairs: AddValues.
template <typename KV>
constexpr bool WidensInRegisters() { return std::is_same_v<KV, float> || (sizeof(KV) > 1 && kLanes == 8); }

template <typename KV>
void AttendTile(const Attention& a, const Task& task, int from, int to, const Ahead<KV>& ahead, Scratch& x) {
  Segment<KV> segments[kTile];
  const int n = Segments(a, task, from, to, segments);
  const int rows = task.count * a.group;
  const bool few = rows <= kFewRows;
  if (few) {
    for (int i = 0; i < n; ++i)
      DotKeys<Unit::kLanes>(x.q, segments[i], a.head_dim, x.scores, rows, ahead.Like(segments, i).k);
  } else {
    for (int i = 0; i < n; ++i) PackKeys(segments[i], a.head_dim, x.keys, ahead.Like(segments, i));
    Rows<kTile / kLanes, false, false>(x.q, a.head_dim, x.keys, kTile, x.scores, kTile, rows, a.head_dim, x.keys);
  }
  WeighTile(a, task, from, to, x);
  for (int i = 0; i < n; ++i) {
    const Segment<KV>& s = segments[i];
    const KV* next = ahead.Like(segments, i).v;
    const float* weights = x.scores + s.offset;
    if constexpr (WidensInRegisters<KV>()) {
      if (few && s.v_scale == nullptr) {
        AddProduct<true>(weights, kTile, s.v, a.head_dim, x.out, a.head_dim, rows, s.count, a.head_dim, next);
        continue;
      }
    }
    const float* values = x.values + s.offset * a.head_dim;
    if constexpr (std::is_same_v<KV, float>)
      values = s.v;
    else
      WidenValues(s, a.head_dim, x.values, next);
    AddProduct<false>(weights, kTile, values, a.head_dim, x.out, a.head_dim, rows, s.count, a.head_dim, values);
  }
}

// ---- bfloat16 in pairs ----------------------------------------------------------------------------------------------

#ifdef __AVX512BF16__

// C[MR, 64] (+)= A[MR, depth] B[depth, 64]; strides in elements. `load_rows(d, row)` gives rows d and d + 1 of B,
// interleaved; one past the last is 0.
template <int MR, bool kAdd, typename LoadRows>
inline void PairMicro(const uint16_t* a, int lda, const LoadRows& load_rows, float* c, int ldc, int depth) {
  __m512 sum[MR][4];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) sum[i][j] = kAdd ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
  for (int d = 0; d < depth; d += 2) {
    __m512bh row[4];
    load_rows(d, row);
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

template <bool kAdd, typename LoadRows>
void PairProduct(const uint16_t* a, int lda, const LoadRows& load_rows, float* c, int ldc, int rows, int depth) {
  int i = 0;
  for (; i + 6 <= rows; i += 6) PairMicro<6, kAdd>(a + i * lda, lda, load_rows, c + i * ldc, ldc, depth);
  a += i * lda;
  c += i * ldc;
  switch (rows - i) {
    case 1: return PairMicro<1, kAdd>(a, lda, load_rows, c, ldc, depth);
    case 2: return PairMicro<2, kAdd>(a, lda, load_rows, c, ldc, depth);
    case 3: return PairMicro<3, kAdd>(a, lda, load_rows, c, ldc, depth);
    case 4: return PairMicro<4, kAdd>(a, lda, load_rows, c, ldc, depth);
    case 5: return PairMicro<5, kAdd>(a, lda, load_rows, c, ldc, depth);
  }
}

// The same for B that lies in memory with its rows interleaved.
template <bool kAdd>
void PairProduct(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int depth) {
  const auto load_rows = [=](int d, __m512bh* row) {
    for (int j = 0; j < 4; ++j) row[j] = (__m512bh)_mm512_loadu_si512(b + d / 2 * ldb + 16 * j);
  };
  PairProduct<kAdd>(a, lda, load_rows, c, ldc, rows, depth);
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

void InterleaveKeys(const Segment<BF16>& s, int head_dim, uint32_t* keys, const BF16* ahead) {
  for (int t = 0; t < s.count; t += 16) {
    for (int d = 0; d < head_dim; d += 32) {
      __m512 r[16];  // 32 numbers of each of 16 keys, moved in pairs
      for (int i = 0; i < 16; ++i)
        r[i] = t + i < s.count ? _mm512_loadu_ps(s.k + (t + i) * head_dim + d) : _mm512_setzero_ps();
      halfmoon::Transpose(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(keys + (d / 2 + i) * kTile + s.offset + t, r[i]);
      Prefetch<16 * 32 * sizeof(BF16)>(ahead + t * head_dim + d * 16);
    }
  }
}

// Interleaves the numbers of two vectors: the first 32 and, in `high`, the last 32 of them.
struct Interleaved {
  __m512i low, high;

  Interleaved(__m512i x, __m512i y) {
    const __m512i i = _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i first = _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(32)), 16));
    low = _mm512_permutex2var_epi16(x, first, y);
    high = _mm512_permutex2var_epi16(x, _mm512_add_epi16(first, _mm512_set1_epi16(16)), y);
  }
};

// 32 numbers, from d on, of the values of tokens t and t + 1; zeros where a segment has no such token.
inline Interleaved ValuePairs(const Segment<BF16>& s, int head_dim, int t, int d) {
  const BF16* v = s.v + t * head_dim + d;
  return {_mm512_loadu_si512(v), t + 1 < s.count ? _mm512_loadu_si512(v + head_dim) : _mm512_setzero_si512()};
}

void InterleaveValues(const Segment<BF16>& s, int head_dim, uint32_t* values, const BF16* ahead) {
  for (int t = 0; t < s.count; t += 2) {
    uint32_t* pair = values + (s.offset + t) / 2 * head_dim;
    for (int d = 0; d < head_dim; d += 32) {
      const Interleaved x = ValuePairs(s, head_dim, t, d);
      _mm512_storeu_si512(pair + d, x.low);
      _mm512_storeu_si512(pair + d + 16, x.high);
      Prefetch<2 * 32 * sizeof(BF16)>(ahead + t * head_dim + d * 2);
    }
  }
}

// Adds a segment's weighted values to the sums of some queries, without a copy of them: worth it for few queries.
void AddValues(const uint16_t* weights, const Segment<BF16>& s, int head_dim, float* out, int rows, const BF16* ahead) {
  for (int d = 0; d < head_dim; d += 64) {
    const auto load_rows = [=, &s](int t, __m512bh* row) {
      for (int j = 0; j < 2; ++j) {
        const Interleaved x = ValuePairs(s, head_dim, t, d + 32 * j);
        row[2 * j] = (__m512bh)x.low, row[2 * j + 1] = (__m512bh)x.high;
      }
      Prefetch<2 * 64 * sizeof(BF16)>(ahead + t * head_dim + d * 2);
    };
    PairProduct<true>(weights + s.offset, kTile, load_rows, out + d, head_dim, rows, s.count);
  }
}

template <Unit kUnit>
void AttendTilePairs(const Attention& a, const Task& task, int from, int to, const Ahead<BF16>& ahead, Scratch& x) {
  Segment<BF16> segments[kTile];
  const int n = Segments(a, task, from, to, segments);
  const int rows = task.count * a.group, dim = a.head_dim, keys = to - from;
  const bool few = kUnit == Unit::kPairs && rows <= kFewRows;
  if (few) {
    for (int i = 0; i < n; ++i)
      DotKeys<Unit::kPairs>(x.q16, segments[i], dim, x.scores, rows, ahead.Like(segments, i).k);
  } else {
    for (int i = 0; i < n; ++i) InterleaveKeys(segments[i], dim, x.keys16, ahead.Like(segments, i).k);
    Product<kUnit, false>(x.q16, dim, x.keys16, kTile, x.scores, kTile, rows, dim);
  }
  WeighTile(a, task, from, to, x);
  for (int i = 0; i < rows * kTile; i += 16)
    Store(reinterpret_cast<BF16*>(x.weights16 + i), Load(x.scores + i));
  if (few) {
    for (int i = 0; i < n; ++i)
      AddValues(x.weights16, segments[i], dim, x.out, rows, ahead.Like(segments, i).v);
    return;
  }
  for (int i = 0; i < n; ++i) InterleaveValues(segments[i], dim, x.values16, ahead.Like(segments, i).v);
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
    for (int d = 0; d < dim; d += kLanes) {
      if constexpr (kUnit == Unit::kLanes) Store(x.q + i * dim + d, Load(q + d));
      Store(x.out + i * dim + d, Zero());
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
    const Floats norm = Fill(total > 0 ? 1.0f / total : 0.0f);
    Q* out = static_cast<Q*>(a.out) + at(i) * dim;
    for (int d = 0; d < dim; d += kLanes) Store(out + d, Mul(Load(x.out + i * dim + d), norm));
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
  a.pages = kd[0], a.kv_heads = kd[1];
  a.page_size = kd[2] * kd[3] / std::max(a.head_dim, 1);  // several tokens may share a row of the pools
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

// Pool [pages, kv_heads, ...] holds pages of tokens like those of x [tokens, kv_heads, head_dim], in the same dtype; the
// result aliases the pool.
ffi::Error Write(ffi::AnyBuffer pool, ffi::AnyBuffer x, const int32_t* slots, ffi::Result<ffi::AnyBuffer>& result) {
  const auto pd = pool.dimensions(), xd = x.dimensions();
  const int64_t tokens = xd[0], pages = pd[0], heads = pd[1];
  char* base = static_cast<char*>(result->untyped_data());
  if (base != pool.untyped_data()) return ffi::Error::Internal("KV write: the pool was not aliased");
  if (x.element_count() == 0 || pool.element_count() == 0) return ffi::Error::Success();
  const int64_t bytes = x.size_bytes() / (tokens * heads), page_size = pool.size_bytes() / (pages * heads * bytes);
  const char* from = static_cast<const char*>(x.untyped_data());
  for (int64_t t = 0; t < tokens; ++t) {
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
