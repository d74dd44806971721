// exp, exp2, tanh, erf, sigmoid on vectors of float and double. Polynomials are Chebyshev fits made for the
// intervals named here; the errors stated are measured by python_tests/common/test_vec_math.py on every
// level.
#pragma once
#include "common/cpu/vec.h"

namespace lwft::LWFT_ISA {

// c[0] + c[1] x + c[2] x^2 + ...
template <class T, int N>
inline Vec<T> polynomial(Vec<T> x, const T (&c)[N]) {
  Vec<T> y = broadcast(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) y = fma(y, x, broadcast(c[i]));
  return y;
}

// Constants of IEEE-754 and of the fits; one struct per type.
template <class T>
struct Math;

template <>
struct Math<float> {
  static constexpr int kMantissaBits = 23, kExponentBias = 127;
  static constexpr float kRound = 12582912.0f;                 // 1.5 * 2^23: x + kRound has x, rounded, as its low bits
  static constexpr float kExpLow = -104.0f, kExpHigh = 89.0f;  // exp gives 0 below, infinity above
  static constexpr float kExp2Low = -151.0f, kExp2High = 129.0f;
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n * kLn2High is exact
  // (e^x - 1 - x) / x^2 on |x| <= ln(2)/2, error 7e-8
  static constexpr float kExp[] = {0.5f, 0.166665770f, 0.0416665547f, 0.00836317307f, 0.00139261761f};
  // (2^x - 1) / x on |x| <= 1/2, error 8e-9
  static constexpr float kExp2[] = {0.693147188f,   0.240226508f,   0.0555035711f,
                                    0.00961808256f, 0.00133908634f, 0.000154531629f};
  // the same on 0 <= x <= 1, error 2e-9
  static constexpr float kExp2Floor[] = {0.693147063f,   0.240229309f,   0.0554852821f,
                                         0.00967545155f, 0.00124678446f, 0.000216129192f};
  // (tanh(x) / x - 1) / x^2 as a polynomial in x^2 on |x| <= 0.625, error 5e-8
  static constexpr float kTanh[] = {-0.333333289f, 0.133327697f, -0.0538509096f, 0.0209971790f, -0.00609671417f};
};

template <>
struct Math<double> {
  static constexpr int kMantissaBits = 52, kExponentBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExpLow = -746.0, kExpHigh = 710.0;
  static constexpr double kExp2Low = -1076.0, kExp2High = 1025.0;
  static constexpr double kLog2e = 1.442695040888963407;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  // as above, error 1e-16
  static constexpr double kExp[] = {0.500000000000000102,     0.166666666666666675,   0.0416666666666241619,
                                    0.00833333333333006445,   0.00138888889171967191, 0.000198412698630405453,
                                    0.0000248015213223686933, 2.75572684803100255e-6, 2.76200758799833666e-7,
                                    2.51003758325612337e-8};
  static constexpr double kExp2[] = {0.693147180559945309,     0.240226506959100982,   0.0555041086648215943,
                                     0.00961812910760688853,   0.00133335581464169353, 0.000154035304417360502,
                                     0.0000152527338298361184, 1.32154425879216897e-6, 1.01780624458457735e-7,
                                     7.0725859492692237e-9,    4.45496059818651839e-10};
  static constexpr double kTanh[] = {-0.333333333333333226,   0.133333333333266577,     -0.0539682539613955708,
                                     0.0218694882605591146,   -0.00886322983092570875,  0.00359205897747345532,
                                     -0.00145530929753464202, 0.00058743728600943819,   -0.000230776162695198579,
                                     0.00007959955735264808,  -0.0000172448744948443302};
};

// significand * 2^n, n a whole number held as T (with AVX-512 any: floor(n) counts); overflows to infinity and underflows through the subnormals.
template <class T>
inline Vec<T> scale_by_power_of_two(Vec<T> significand, Vec<T> n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_maskz_scalef_ps(0xFFFF, significand, n);
  if constexpr (std::is_same_v<T, double>) return _mm512_maskz_scalef_pd(0xFF, significand, n);
#endif
  using Bits = Vec<Int<T>>;
  // In two steps: 2^n itself may lie outside the format where the product does not.
  const Bits exponent = bit_cast<Bits>(n + Math<T>::kRound) - bit_cast<Int<T>>(Math<T>::kRound);
  const Bits half = exponent >> 1, rest = exponent - half;
  const Vec<T> first = bit_cast<Vec<T>>((half + Math<T>::kExponentBias) << Math<T>::kMantissaBits);
  const Vec<T> second = bit_cast<Vec<T>>((rest + Math<T>::kExponentBias) << Math<T>::kMantissaBits);
  return significand * first * second;
}

template <class T>
inline Vec<T> exp_vector(Vec<T> x) {
  using M = Math<T>;
  x = min(broadcast(M::kExpHigh), max(broadcast(M::kExpLow), x));
  // e^x = 2^n e^r, n = round(x / ln 2), r = x - n ln 2
  const Vec<T> n = (x * M::kLog2e + M::kRound) - M::kRound;
  const Vec<T> r = (x - n * M::kLn2High) - n * M::kLn2Low;
  return scale_by_power_of_two<T>(fma(r * r, polynomial(r, M::kExp), r) + T{1}, n);
}

template <class T>
inline Vec<T> exp2_vector(Vec<T> x) {
  using M = Math<T>;
#if defined(__AVX512DQ__)
  // x - floor(x) is one instruction, and 2^floor(x) another, right for every x: no limits to look at
  if constexpr (std::is_same_v<T, float>) {
    constexpr int kDown = 1;
    const Vec<T> f = _mm512_maskz_reduce_ps(0xFFFF, x, kDown);
    return scale_by_power_of_two<T>(fma(f, polynomial(f, M::kExp2Floor), broadcast(T{1})), x);
  }
#endif
  x = min(broadcast(M::kExp2High), max(broadcast(M::kExp2Low), x));
  const Vec<T> n = (x + M::kRound) - M::kRound, f = x - n;
  return scale_by_power_of_two<T>(fma(f, polynomial(f, M::kExp2), broadcast(T{1})), n);
}

template <class T>
inline Vec<T> tanh_vector(Vec<T> x) {
  const Vec<T> square = x * x, magnitude = abs(x);
  const Vec<T> small = fma(x * square, polynomial(square, Math<T>::kTanh), x);
  const Vec<T> large = T{1} - T{2} / (exp_vector<T>(magnitude + magnitude) + T{1});
  return select(magnitude < T(0.625), small, with_sign(large, x));
}

// All of these: NaN gives NaN; exp and exp2 of -infinity are 0, and so are those of anything too small.
// Relative error at most 2 ulp.
inline Vec<float> exp(Vec<float> x) { return exp_vector<float>(x); }
inline Vec<double> exp(Vec<double> x) { return exp_vector<double>(x); }
inline Vec<float> exp2(Vec<float> x) { return exp2_vector<float>(x); }
inline Vec<double> exp2(Vec<double> x) { return exp2_vector<double>(x); }
inline Vec<float> tanh(Vec<float> x) { return tanh_vector<float>(x); }
inline Vec<double> tanh(Vec<double> x) { return tanh_vector<double>(x); }

// Absolute error at most 2e-7.
inline Vec<float> erf(Vec<float> x) {
  // erf(x) / x in x^2 on |x| <= 1, error 2e-9
  static constexpr float kSmall[] = {1.12837917f,    -0.376126267f,    0.112835947f,    -0.0268542120f,
                                     0.00518908742f, -0.000801686429f, 0.0000787587506f};
  // log2(erfc(x)) on 1 <= x <= 4, error 3e-8; beyond 4 erf is 1 in float
  static constexpr float kLarge[] = {0.000461861577f, -1.63058217f,      -0.911532311f,
                                     -0.158811990f,   0.0381176419f,     -0.00686664597f,
                                     0.000861008516f, -0.0000664477098f, 0.00000236191023f};
  const Vec<float> magnitude = min(broadcast(4.0f), abs(x));
  const Vec<float> small = x * polynomial(x * x, kSmall);
  const Vec<float> large = 1.0f - exp2(polynomial(magnitude, kLarge));
  return select(magnitude < 1.0f, small, with_sign(large, x));
}

// By the C library, lane by lane: float64 is here to be right (gradcheck), not fast.
inline Vec<double> erf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}

// 1 / (1 + e^-x)
template <class V>
inline V sigmoid(V x) {
  using T = LaneOf<V>;
  return T{1} / (T{1} + exp(-x));
}

}  // namespace lwft::LWFT_ISA
