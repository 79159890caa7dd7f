// Float32 vectors as wide as the CPU's registers, and what the kernels do with them.
//
// A kernel is written once, for vectors of kLanes; what it keeps in registers is a function of kLanes and kRegisters.
// simd_avx512.h and simd_avx2.h hold the same names.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace halfmoon {

// Storage types without arithmetic of their own.
struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };
struct F8E4M3 { uint8_t bits; };
struct F8E5M2 { uint8_t bits; };

}  // namespace halfmoon

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#error "These kernels need AVX-512 (F, BW, DQ, VL) or AVX2 with FMA and F16C."
#endif

namespace halfmoon {

// exp(x) for x <= 0, to 2 ulp or so; 0 for -inf.
inline Floats Exp(Floats x) {
  const Floats y = Max(Mul(x, Fill(1.44269504088896f)), Fill(-160.0f));
  const Floats whole = Round(y);
  const Floats f = Sub(y, whole);
  Floats p = Fill(1.5403530e-4f);
  p = MultiplyAdd(p, f, Fill(1.3333558e-3f));
  p = MultiplyAdd(p, f, Fill(9.6181291e-3f));
  p = MultiplyAdd(p, f, Fill(5.5504109e-2f));
  p = MultiplyAdd(p, f, Fill(2.4022651e-1f));
  p = MultiplyAdd(p, f, Fill(6.9314718e-1f));
  p = MultiplyAdd(p, f, Fill(1.0f));
  return TimesPowerOf2(p, whole);
}

// cap * tanh(x / cap)
inline Floats SoftCap(Floats x, float cap) {
  const Floats e = Exp(Mul(Abs(x), Fill(-2.0f / cap)));
  const Floats one = Fill(1.0f);
  return NegateWhereNegative(Mul(Div(Sub(one, e), Add(one, e)), Fill(cap)), x);
}

}  // namespace halfmoon
