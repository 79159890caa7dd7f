// The vectors of simd.h on AVX-512.

#pragma once

#include <immintrin.h>

#include <algorithm>

namespace halfmoon {

using Floats = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

inline Floats Zero() { return _mm512_setzero_ps(); }
inline Floats Fill(float x) { return _mm512_set1_ps(x); }

inline Floats Load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats Load(const BF16* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Floats Load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats Load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Floats Load(const F8E5M2* p) {  // the upper half of a float16
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(x, 8));
}
inline Floats Load(const F8E4M3* p) {  // a float16 with its exponent bias 8 too low
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7);
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.0f));
}

// The vector, in a register: compilers load it again for each product, and then products wait for loads.
template <typename Vector>
inline Vector Held(Vector x) {
  asm("" : "+v"(x));
  return x;
}

inline void Store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void Store(F16* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void Store(BF16* p, Floats x) {  // round to nearest even; the values are finite
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

inline Floats Add(Floats x, Floats y) { return _mm512_add_ps(x, y); }
inline Floats Sub(Floats x, Floats y) { return _mm512_sub_ps(x, y); }
inline Floats Mul(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
inline Floats Div(Floats x, Floats y) { return _mm512_div_ps(x, y); }
inline Floats MultiplyAdd(Floats x, Floats y, Floats sum) { return _mm512_fmadd_ps(x, y, sum); }
inline Floats Max(Floats x, Floats y) { return _mm512_max_ps(x, y); }
inline Floats Abs(Floats x) { return _mm512_abs_ps(x); }
inline Floats Round(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^whole, for whole numbers of at least -160.
inline Floats TimesPowerOf2(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }
// x, with its sign turned where `by` is below 0.
inline Floats NegateWhereNegative(Floats x, Floats by) {
  return _mm512_mask_sub_ps(x, _mm512_cmp_ps_mask(by, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps(), x);
}
inline float ReduceMax(Floats x) { return _mm512_reduce_max_ps(x); }
inline float ReduceAdd(Floats x) { return _mm512_reduce_add_ps(x); }

using Mask = __mmask16;
// The lanes from `from` on and before `to`; both may lie outside.
inline Mask Between(int from, int to) {
  const int first = std::clamp(from, 0, 16), last = std::clamp(to, 0, 16);
  return static_cast<Mask>(((1u << last) - 1) & ~((1u << first) - 1));
}
// max(x, y) in the lanes of the mask, x in others.
inline Floats MaxWhere(Mask mask, Floats x, Floats y) { return _mm512_mask_max_ps(x, mask, x, y); }
// x in the lanes of the mask, 0 in others.
inline Floats Where(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }

// Transposes 16 vectors in place.
inline void Transpose(Floats r[kLanes]) {
  Floats t[16];
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
    const Floats a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    const Floats c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88), d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Lane i of the result is the sum of the lanes of v[i], added in an order that does not depend on i.
inline Floats Sums(const Floats v[kLanes]) {
  Floats pairs[8], quarters[4], halves[2];
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quarters[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i)
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quarters[2 * i], quarters[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(quarters[2 * i], quarters[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                       _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

// Pairs of bfloat16 as they lie in memory: 2 * kLanes numbers.
#ifdef __AVX512BF16__
using Pairs = __m512bh;
inline Pairs LoadPairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Floats MultiplyAdd(Pairs x, Pairs y, Floats sum) { return _mm512_dpbf16_ps(sum, x, y); }
#else
using Pairs = __m512i;
inline Pairs LoadPairs(const void* p) { return _mm512_loadu_si512(p); }
inline Floats Odd(Pairs x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000))); }
inline Floats Even(Pairs x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline Floats MultiplyAdd(Pairs x, Pairs y, Floats sum) {
  return MultiplyAdd(Odd(x), Odd(y), MultiplyAdd(Even(x), Even(y), sum));
}
#endif

}  // namespace halfmoon
