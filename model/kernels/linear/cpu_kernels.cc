// A few rows times a weight on CPUs, as an XLA FFI handler: out[m, n] = sum over k of x[m, k] * weight[n, k].
//
// With few rows the time goes into reading the weight, once, so the weight is neither packed nor copied, and while the
// arithmetic of eight weight rows runs, the next eight are prefetched. A tile keeps kLanes dot products in registers. The
// sum of a row runs in the same order whatever other rows there are: results do not depend on the batch, bit for bit.
// Where the CPU has AMX, bfloat16 takes its tile products instead, 16 columns by 16 rows of x, to the same end.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../parallel_for.h"
#include "../simd.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kDepth = 1024;       // a slice of k: eight weight rows and as many of x stay in L2
constexpr int kColumns = 8;            // weight rows that go together
constexpr int kLineBytes = 64;         // of the caches, and what a row is a multiple of
constexpr int64_t kTaskBytes = 1 << 17;
constexpr int64_t kAloneBytes = 1 << 18;  // a smaller weight is not worth waking a thread

using halfmoon::BF16;
using halfmoon::Floats;
using halfmoon::kLanes;

// One register of numbers to multiply.
inline Floats LoadFactors(const float* p) { return halfmoon::Load(p); }
inline halfmoon::Pairs LoadFactors(const BF16* p) { return halfmoon::LoadPairs(p); }

// How many weight rows, of NR, share a tile with MR rows of x: as many as there are sums, one for each lane of a vector.
constexpr int TileColumns(int nr, int mr) { return nr * mr <= kLanes ? nr : TileColumns(nr / 2, mr); }

template <typename T>
struct Operands {
  const T *x, *weight;
  float* out;
  int64_t rows, size, columns;  // x [rows, size], weight [columns, size], out [rows, columns]
};

// NR * MR <= kLanes dot products of `depth` elements from (m, n, k) on. Meanwhile kAhead weight rows are prefetched, from
// `ahead` on; those past the end of the weight are harmless.
template <typename T, int NR, int MR, int kAhead>
inline void Tile(const Operands<T>& o, int64_t m, int64_t n, int64_t k, int64_t depth, const T* ahead) {
  constexpr int kStep = kLanes * sizeof(float) / sizeof(T), kLine = kLineBytes / sizeof(T);
  const int64_t size = o.size;
  const T *x = o.x + m * size + k, *weight = o.weight + n * size + k;
  Floats sums[kLanes];
  for (Floats& sum : sums) sum = halfmoon::Zero();
  for (int64_t i = 0; i < depth; i += kStep) {
    if (kStep == kLine || i % kLine == 0)
      for (int c = 0; c < kAhead; ++c)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + c * size + i), _MM_HINT_T0);
    decltype(LoadFactors(x)) xs[MR];
    for (int r = 0; r < MR; ++r) xs[r] = halfmoon::Held(LoadFactors(x + r * size + i));
    for (int c = 0; c < NR; ++c) {
      auto w = LoadFactors(weight + c * size + i);
      if constexpr (MR > 1) w = halfmoon::Held(w);  // a factor of one product is loaded by it
      for (int r = 0; r < MR; ++r) sums[r * NR + c] = halfmoon::MultiplyAdd(w, xs[r], sums[r * NR + c]);
    }
  }
  alignas(64) float dots[kLanes];
  halfmoon::Store(dots, halfmoon::Sums(sums));
  for (int r = 0; r < MR; ++r) {
    float* out = o.out + (m + r) * o.columns + n;
    for (int c = 0; c < NR; ++c) out[c] = k > 0 ? out[c] + dots[r * NR + c] : dots[r * NR + c];
  }
}

// MR rows of x times NR weight rows. Of the tiles that share weight rows the first kShares prefetch the next ones, each
// its part, so that memory and arithmetic overlap; with kShares 0 that is left to the CPU.
template <typename T, int NR, int MR, int kShares>
inline void Tiles(const Operands<T>& o, int64_t m, int64_t n, int64_t k, int64_t depth) {
  constexpr int kTogether = TileColumns(NR, MR), kSharing = std::min(kShares, kTogether);
  constexpr int kAhead = kTogether / std::max(kSharing, 1);
  const int64_t share = m / 4;
  for (int64_t c = n; c < n + NR; c += kTogether) {
    const T* ahead = o.weight + (c + kColumns + share * kAhead) * o.size + k;
    if (share < kSharing)
      Tile<T, kTogether, MR, kAhead>(o, m, c, k, depth, ahead);
    else
      Tile<T, kTogether, MR, 0>(o, m, c, k, depth, ahead);
  }
}

// All rows of x times NR weight rows, from k on.
template <typename T, int NR, int kShares>
inline void Rows(const Operands<T>& o, int64_t n, int64_t k, int64_t depth) {
  int64_t m = 0;
  for (; m + 4 <= o.rows; m += 4) Tiles<T, NR, 4, kShares>(o, m, n, k, depth);
  switch (o.rows - m) {
    case 1: return Tiles<T, NR, 1, kShares>(o, m, n, k, depth);
    case 2: return Tiles<T, NR, 2, kShares>(o, m, n, k, depth);
    case 3: return Tiles<T, NR, 3, kShares>(o, m, n, k, depth);
  }
}

template <typename T, int NR>
inline void Rows(const Operands<T>& o, int64_t n, int64_t k, int64_t depth) {
  if (o.rows <= 2) return Rows<T, NR, 0>(o, n, k, depth);  // memory is read fastest where nothing else loads
  if (o.rows <= 4) return Rows<T, NR, 1>(o, n, k, depth);
  if (o.rows <= 12) return Rows<T, NR, 2>(o, n, k, depth);
  Rows<T, NR, 4>(o, n, k, depth);
}

template <typename T>
void Columns(const Operands<T>& o, int64_t from, int64_t to) {
  int64_t n = from;
  for (; n + kColumns <= to; n += kColumns)
    for (int64_t k = 0; k < o.size; k += kDepth) Rows<T, kColumns>(o, n, k, std::min(kDepth, o.size - k));
  for (; n < to; ++n)
    for (int64_t k = 0; k < o.size; k += kDepth) Rows<T, 1>(o, n, k, std::min(kDepth, o.size - k));
}

// ---- bfloat16 on AMX ------------------------------------------------------------------------------------------------

#ifdef __AMX_BF16__

// The operating system hands out tile registers to those who ask.
bool HasAmx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Offsets of a column of a 16-wide array.
inline __m512i Column16() {
  return _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
}

// x by groups of 16 rows, transposed, in pairs along k: [groups, size / 2, 16] 32-bit pairs; rows past the end are 0.
void Pack(const Operands<BF16>& o, int64_t group, uint32_t* packed) {
  const int64_t pairs = o.size / 2, count = std::min<int64_t>(16, o.rows - 16 * group);
  uint32_t* to = packed + group * pairs * 16;
  if (count < 16) std::memset(to, 0, pairs * 16 * sizeof(uint32_t));
  for (int64_t r = 0; r < count; ++r) {
    const BF16* row = o.x + (16 * group + r) * o.size;
    for (int64_t i = 0; i < pairs; i += 16)
      _mm512_i32scatter_epi32(to + i * 16 + r, Column16(), _mm512_loadu_si512(row + 2 * i), 4);
  }
}

// 32 columns from n on times one or two groups of rows.
template <int kGroups>
void TilesAmx(const Operands<BF16>& o, const uint32_t* packed, int64_t group, int64_t n) {
  const BF16* weight = o.weight + n * o.size;
  const int64_t stride = o.size * sizeof(BF16), pairs = o.size / 2;
  const uint32_t* x = packed + group * pairs * 16;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kGroups == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < o.size; k += 32) {
    if (group == 0)
      for (int c = 0; c < 32; ++c)
        _mm_prefetch(reinterpret_cast<const char*>(weight + (32 + c) * o.size + k), _MM_HINT_T0);
    _tile_loadd(4, weight + k, stride);
    _tile_loadd(5, weight + 16 * o.size + k, stride);
    _tile_loadd(6, x + k * 8, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kGroups == 2) {
      _tile_loadd(7, x + (pairs + k / 2) * 16, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[2 * kGroups][16][16];  // [tile, column, row of x]
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  if constexpr (kGroups == 2) {
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
  }
  for (int g = 0; g < kGroups; ++g)
    for (int64_t r = 0; r < std::min<int64_t>(16, o.rows - 16 * (group + g)); ++r)
      for (int h = 0; h < 2; ++h)
        _mm512_storeu_ps(o.out + (16 * (group + g) + r) * o.columns + n + 16 * h,
                         _mm512_i32gather_ps(Column16(), &sums[2 * g + h][0][r], 4));
}

void ColumnsAmx(const Operands<BF16>& o, const uint32_t* packed, int64_t from, int64_t to) {
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  const int64_t groups = (o.rows + 15) / 16;
  int64_t n = from;
  for (; n + 32 <= to; n += 32) {
    int64_t group = 0;
    for (; group + 2 <= groups; group += 2) TilesAmx<2>(o, packed, group, n);
    if (group < groups) TilesAmx<1>(o, packed, group, n);
  }
  _tile_release();
  Columns(o, n, to);
}

#endif

// ---- dispatch -------------------------------------------------------------------------------------------------------

template <typename T>
void Run(ffi::ThreadPool& pool, const Operands<T>& o) {
  const int64_t row_bytes = std::max<int64_t>(o.size * sizeof(T), 1);
  const int64_t step = std::max<int64_t>(kTaskBytes / row_bytes / 32, 1) * 32;
  const int threads = o.columns * row_bytes > kAloneBytes ? pool.num_threads() : 1;
  const int64_t tasks = (o.columns + step - 1) / step;
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<T, BF16>) {
    if (HasAmx()) {
      thread_local std::vector<uint32_t> scratch;
      const int64_t groups = (o.rows + 15) / 16;
      scratch.resize(groups * 16 * o.size / 2);
      uint32_t* packed = scratch.data();
      halfmoon::ParallelFor(pool, groups > 4 ? threads : 1, groups, [&](int group) { Pack(o, group, packed); });
      halfmoon::ParallelFor(pool, threads, tasks, [&](int task) {
        ColumnsAmx(o, packed, task * step, std::min((task + 1) * step, o.columns));
      });
      return;
    }
  }
#endif
  halfmoon::ParallelFor(pool, threads, tasks,
                        [&](int task) { Columns(o, task * step, std::min((task + 1) * step, o.columns)); });
}

// Block b of x [blocks, rows, size] times weight `which[b]` of [weights, columns, size].
template <typename T>
ffi::Error RunBlocks(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& weights,
                     const int32_t* which, float* out) {
  const auto xd = x.dimensions(), wd = weights.dimensions();
  const int64_t rows = xd[1], size = xd[2], columns = wd[1];
  if (size % (kLineBytes / sizeof(T))) return ffi::Error::InvalidArgument("linear: unsupported size");
  for (int64_t block = 0; block < xd[0]; ++block) {
    const int64_t weight = std::clamp<int64_t>(which[block], 0, wd[0] - 1);
    Run<T>(pool, {static_cast<const T*>(x.untyped_data()) + block * rows * size,
                  static_cast<const T*>(weights.untyped_data()) + weight * columns * size, out + block * rows * columns,
                  rows, size, columns});
  }
  return ffi::Error::Success();
}

ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::Buffer<ffi::S32> which,
                  ffi::Result<ffi::Buffer<ffi::F32>> out) {
  if (x.element_type() != weights.element_type()) return ffi::Error::InvalidArgument("linear: dtypes differ");
  switch (weights.element_type()) {
    case ffi::DataType::F32: return RunBlocks<float>(pool, x, weights, which.typed_data(), out->typed_data());
    case ffi::DataType::BF16: return RunBlocks<BF16>(pool, x, weights, which.typed_data(), out->typed_data());
    default: return ffi::Error::InvalidArgument("linear: unsupported dtype");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(HalfmoonLinear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
