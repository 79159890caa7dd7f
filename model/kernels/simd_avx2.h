// The vectors of simd.h on AVX2 with FMA and F16C. simd_avx512.h says what each function does.

#pragma once

#include <immintrin.h>

namespace halfmoon {

using Floats = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

inline Floats Zero() { return _mm256_setzero_ps(); }
inline Floats Fill(float x) { return _mm256_set1_ps(x); }

inline Floats Load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats Load(const BF16* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline Floats Load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Floats Load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats Load(const F8E5M2* p) {
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_slli_epi16(x, 8));
}
inline Floats Load(const F8E4M3* p) {
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x80)), 8);
  const __m128i rest = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x7f)), 7);
  return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), _mm256_set1_ps(256.0f));
}

inline Floats Held(Floats x) {
  asm("" : "+x"(x));
  return x;
}
inline __m256i Held(__m256i x) { return x; }  // pairs and what is made of them are too many for the registers

inline void Store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline void Store(F16* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void Store(BF16* p, Floats x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i upper = _mm256_srli_epi32(rounded, 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
}

inline Floats Add(Floats x, Floats y) { return _mm256_add_ps(x, y); }
inline Floats Sub(Floats x, Floats y) { return _mm256_sub_ps(x, y); }
inline Floats Mul(Floats x, Floats y) { return _mm256_mul_ps(x, y); }
inline Floats Div(Floats x, Floats y) { return _mm256_div_ps(x, y); }
inline Floats MultiplyAdd(Floats x, Floats y, Floats sum) { return _mm256_fmadd_ps(x, y, sum); }
inline Floats Max(Floats x, Floats y) { return _mm256_max_ps(x, y); }
inline Floats Abs(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Floats Round(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats TimesPowerOf2(Floats x, Floats whole) {  // in two steps: 2^-160 is no float32, what it makes of x is
  const __m256i n = _mm256_cvtps_epi32(whole), half = _mm256_srai_epi32(n, 1), bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias), 23);
  return Mul(Mul(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}
inline Floats NegateWhereNegative(Floats x, Floats by) {
  const __m256 negative = _mm256_cmp_ps(by, _mm256_setzero_ps(), _CMP_LT_OQ);
  return _mm256_xor_ps(x, _mm256_and_ps(negative, _mm256_set1_ps(-0.0f)));
}
inline float ReduceMax(Floats x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline float ReduceAdd(Floats x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

using Mask = __m256i;
inline Mask Between(int from, int to) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(from), lane),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane));
}
inline Floats MaxWhere(Mask mask, Floats x, Floats y) {
  return _mm256_blendv_ps(x, _mm256_max_ps(x, y), _mm256_castsi256_ps(mask));
}
inline Floats Where(Mask mask, Floats x) { return _mm256_and_ps(_mm256_castsi256_ps(mask), x); }

inline void Transpose(Floats r[kLanes]) {
  Floats t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

inline Floats Sums(const Floats v[kLanes]) {
  Floats pairs[4], halves[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = Add(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 2; ++i)
    halves[i] = Add(_mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                    _mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
  return Add(_mm256_permute2f128_ps(halves[0], halves[1], 0x20), _mm256_permute2f128_ps(halves[0], halves[1], 0x31));
}

using Pairs = __m256i;
inline Pairs LoadPairs(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Floats Odd(Pairs x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff0000))); }
inline Floats Even(Pairs x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline Floats MultiplyAdd(Pairs x, Pairs y, Floats sum) {
  return MultiplyAdd(Odd(x), Odd(y), MultiplyAdd(Even(x), Even(y), sum));
}

}  // namespace halfmoon
