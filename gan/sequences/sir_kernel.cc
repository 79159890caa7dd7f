// SIR of many codes on a CPU: one Levinson recursion per vector lane, everything in L1.
//
// With a_k the order-k predictor (a_k[0] = 1), E_k its error power and T = Toeplitz(C_s):
//   q = s^T T^-1 s = sum_k (sum_j a_k[j] s[k-j])^2 / E_k,   SIR = q / (1 - q).
// The sums that order k+1 needs are taken while a_{k+1} is written, so a is read once per order.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Floats per vector. The inner loop holds seven blocks: with 16 wide vectors on a machine whose registers are shorter, a
// compiler would split them into more than there are registers, and halve the speed by spilling.
#ifdef __AVX512F__
constexpr int kWidth = 16;
#else
constexpr int kWidth = 8;
#endif
using Floats = float __attribute__((vector_size(kWidth * sizeof(float))));

// Lanes of one recursion: two vectors, so that one's arithmetic hides the other's latency.
constexpr int kVectors = 2;
constexpr int kLanes = kVectors * kWidth;

struct Block {
  Floats v[kVectors];
};

inline Block operator*(const Block& x, const Block& y) { return {{x.v[0] * y.v[0], x.v[1] * y.v[1]}}; }
inline Block operator/(const Block& x, const Block& y) { return {{x.v[0] / y.v[0], x.v[1] / y.v[1]}}; }
inline Block operator-(const Block& x) { return {{-x.v[0], -x.v[1]}}; }
// x + y * z
inline Block MultiplyAdd(const Block& y, const Block& z, const Block& x) {
  return {{x.v[0] + y.v[0] * z.v[0], x.v[1] + y.v[1] * z.v[1]}};
}
inline Block Fill(float value) { return {{Floats{} + value, Floats{} + value}}; }

// Room for one block of codes; s and r are filled by the caller.
struct Workspace {
  explicit Workspace(int length) : s(length), r(length + 1), a(length + 1), bits(length), sums(length) {}
  struct Words {
    int16_t lane[kLanes];
  };
  std::vector<Block> s, r, a;
  std::vector<Words> bits, sums;
};

// SIR of each lane, from s[0 ... length-1] and its autocorrelation r[0 ... length-1].
void Sir(int length, Workspace& w, float* out) {
  Block* a = w.a.data();
  const Block *s = w.s.data(), *r = w.r.data();
  a[0] = Fill(1);
  w.r[length] = Fill(0);
  Block energy = r[0], innovation = s[0], moment = r[1], q = Fill(0);
  for (int k = 0;; ++k) {
    const Block inverse = Fill(1) / energy;
    q = MultiplyAdd(innovation * innovation, inverse, q);
    if (k == length - 1) break;
    const Block reflection = -(moment * inverse);
    energy = MultiplyAdd(-(energy * reflection), reflection, energy);
    // a_{k+1}[j] = a_k[j] + reflection a_k[k+1-j] in pairs (j, k+1-j), and its products with s and r.
    a[k + 1] = reflection;
    const int next = k + 1;
    Block f0 = MultiplyAdd(reflection, s[0], s[next]), f1 = Fill(0);
    Block m0 = MultiplyAdd(reflection, r[1], r[next + 1]), m1 = Fill(0);
    int low = 1, high = k;
    for (; low < high; ++low, --high) {
      const Block x = a[low], y = a[high];
      const Block new_x = MultiplyAdd(reflection, y, x), new_y = MultiplyAdd(reflection, x, y);
      a[low] = new_x;
      a[high] = new_y;
      f0 = MultiplyAdd(new_x, s[high], f0);
      f1 = MultiplyAdd(new_y, s[low], f1);
      m0 = MultiplyAdd(new_x, r[high + 1], m0);
      m1 = MultiplyAdd(new_y, r[low + 1], m1);
    }
    if (low == high) {
      a[low] = MultiplyAdd(reflection, a[low], a[low]);
      f0 = MultiplyAdd(a[low], s[low], f0);
      m0 = MultiplyAdd(a[low], r[low + 1], m0);
    }
    innovation = MultiplyAdd(f1, Fill(1), f0);
    moment = MultiplyAdd(m1, Fill(1), m0);
  }
  for (int v = 0; v < kVectors; ++v) {
    const Floats sir = q.v[v] / (1.0f - q.v[v]);
    __builtin_memcpy(out + v * kWidth, &sir, sizeof(sir));
  }
}

float& Lane(Block& block, int lane) { return reinterpret_cast<float*>(&block)[lane]; }

// Lanes are `count` codes, [count, length]; the rest repeat the last one.
void LoadCodes(const int8_t* codes, int count, int length, Workspace& w) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int8_t* code = codes + static_cast<int64_t>(std::min(lane, count - 1)) * length;
    for (int i = 0; i < length; ++i) {
      Lane(w.s[i], lane) = code[i];
      w.bits[i].lane[lane] = code[i] < 0 ? -1 : 0;
    }
  }
  for (int u = 0; u < length; ++u) {
    int16_t differing[kLanes] = {};
    for (int i = 0; i + u < length; ++i) {
      const int16_t *x = w.bits[i].lane, *y = w.bits[i + u].lane;
      for (int lane = 0; lane < kLanes; ++lane) differing[lane] += x[lane] ^ y[lane];
    }
    float* r = &Lane(w.r[u], 0);
    for (int lane = 0; lane < kLanes; ++lane) r[lane] = static_cast<float>(length - u + 2 * differing[lane]);
  }
}

// Lanes are one code with chip `first`, `first + 1`, ... flipped. `padded` holds the code between zeros, `length` before
// and `length + kLanes` after it; `base` is its autocorrelation.
void LoadFlips(const float* padded, const float* base, int first, int length, Workspace& w) {
  const float* code = padded + length;
  for (int i = 0; i < length; ++i) w.s[i] = Fill(code[i]);
  for (int lane = 0; lane < kLanes && first + lane < length; ++lane) Lane(w.s[first + lane], lane) *= -1;
  w.r[0] = Fill(base[0]);
  for (int u = 1; u < length; ++u) {
    // Flipping chip k changes C(u) by -2 s_k (s_{k-u} + s_{k+u}).
    float* r = &Lane(w.r[u], 0);
    const float *here = code + first, *before = here - u, *after = here + u;
    for (int lane = 0; lane < kLanes; ++lane) r[lane] = base[u] - 2 * here[lane] * (before[lane] + after[lane]);
  }
}

// Calls body(0) ... body(count - 1) in the caller and in the threads of the pool. The caller works too and waits only
// for calls that have begun, so a pool whose threads are all busy cannot block it.
template <class Body>
void InParallel(ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct Progress {
    std::atomic<int64_t> next{0}, finished{0};
  };
  auto progress = std::make_shared<Progress>();
  // A helper that starts late takes no number, hence never touches `body`.
  auto work = [progress, count, &body] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < count;) {
      body(i);
      if (progress->finished.fetch_add(1) + 1 == count) progress->finished.notify_all();
    }
  };
  for (int64_t helper = 1; helper < std::min<int64_t>(pool.num_threads(), count); ++helper) {
    pool.Schedule(decltype(work)(work));
  }
  work();
  for (int64_t seen; (seen = progress->finished.load()) < count;) progress->finished.wait(seen);
}

constexpr int kBlocksPerTask = 8;

ffi::Error SirOfCodes(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> codes, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t count = codes.dimensions()[0];
  const int length = static_cast<int>(codes.dimensions()[1]);
  constexpr int64_t kPerTask = kBlocksPerTask * kLanes;
  InParallel(pool, (count + kPerTask - 1) / kPerTask, [&](int64_t task) {
    Workspace workspace(length);
    for (int64_t at = task * kPerTask; at < std::min(count, (task + 1) * kPerTask); at += kLanes) {
      const int taken = static_cast<int>(std::min<int64_t>(kLanes, count - at));
      float sir[kLanes];
      LoadCodes(codes.typed_data() + at * length, taken, length, workspace);
      Sir(length, workspace, sir);
      std::copy_n(sir, taken, out->typed_data() + at);
    }
  });
  return ffi::Error::Success();
}

ffi::Error SirOfFlips(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> codes, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t count = codes.dimensions()[0];
  const int length = static_cast<int>(codes.dimensions()[1]);
  constexpr int64_t kPerTask = kBlocksPerTask / 2;
  InParallel(pool, (count + kPerTask - 1) / kPerTask, [&](int64_t task) {
    Workspace workspace(length);
    std::vector<float> padded(3 * length + kLanes), base(length);
    for (int64_t row = task * kPerTask; row < std::min(count, (task + 1) * kPerTask); ++row) {
      const int8_t* code = codes.typed_data() + row * length;
      std::copy_n(code, length, padded.begin() + length);
      for (int u = 0; u < length; ++u) {
        int sum = 0;
        for (int i = 0; i + u < length; ++i) sum += code[i] * code[i + u];
        base[u] = static_cast<float>(sum);
      }
      for (int first = 0; first < length; first += kLanes) {
        float sir[kLanes];
        LoadFlips(padded.data(), base.data(), first, length, workspace);
        Sir(length, workspace, sir);
        std::copy_n(sir, std::min(kLanes, length - first), out->typed_data() + row * length + first);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    HalfmoonSir, SirOfCodes,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S8>>().Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    HalfmoonSirOfFlips, SirOfFlips,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S8>>().Ret<ffi::Buffer<ffi::F32>>());
