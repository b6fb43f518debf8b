// Online softmax over rows whose scores arrive tile by tile (Milakov and Gimelshein 2018; FlashAttention-2,
// algorithm 1). Works in base 2: with c = log2(e) * scale, exp(scale * (s - max)) = exp2(s * c - max * c),
// one FFMA and one ex2 per score.
#pragma once
#include "math/reduce.cuh"

namespace fm {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

FM_DEVICE float exp2_approx(float x) { return ex2_approx_ftz_f32(x); }
FM_DEVICE float log2_approx(float x) { return lg2_approx_ftz_f32(x); }

// tanh through ex2 and rcp: absolute error near 1e-7 over the whole line (tanh.approx has 5e-4).
FM_DEVICE float tanh_exp2(float x) {
  const float e = exp2_approx(2.f * kLog2e * x);
  return fmaf(-2.f, rcp_approx_ftz_f32(e + 1.f), 1.f);
}

// tanh(x / 4) for |x| below 2, on the FMA units alone: relative error 6e-7.
FM_DEVICE float tanh_of_fourth(float x) {
  const float y = x * x;
  const float c = fmaf(fmaf(-0.0444022f / 16384, y, 0.13190296f / 1024), y, -0.33326318f / 64);
  return x * fmaf(c, y, 0.99999946f / 4);
}

// The exponent (of 2) that a score s gets in the softmax is scale * log2(e) * s ...
template <bool kWide_>
struct LinearExponent {
  // kWide: scores may be so large (a bias of -3e38) that s * c overflows. Where a maximum is, it is subtracted
  // first, one FADD more.
  static constexpr bool kWide = kWide_, kCurved = false, kBounded = false;
  static constexpr float kLag = 8.f;
  static constexpr float kFar = 1e37f;  // such maxima are far
  float scale;

  FM_DEVICE float difference(float s, float other) const { return (s - other) * (scale * kLog2e); }
  FM_DEVICE float below(float s, float top) const {
    return fmaf(s, scale * kLog2e, -top * (scale * kLog2e));
  }
  FM_DEVICE float natural(float s) const { return s * scale; }
};

// ... or softcap * log2(e) * tanh(scale * s / softcap), where -inf stays -inf. It grows with s, so the
// maximum may be taken before.
struct SoftcapExponent {
  static constexpr bool kWide = false, kCurved = true, kBounded = false;
  static constexpr float kLag = 8.f;
  // |argument| of tanh up to which a polynomial has a relative error of 6e-7
  static constexpr float kLimit = 0.5f;
  float softcap;
  float to_tanh;        // scale / softcap
  const float (&c)[4];  // the polynomial: exponent = s (c0 + c1 s^2 + c2 s^4 + c3 s^6), from the host

  FM_DEVICE float natural(float s) const { return s == -infinity() ? s : softcap * tanh_exp2(s * to_tanh); }
  FM_DEVICE float difference(float s, float other) const { return (natural(s) - natural(other)) * kLog2e; }
  FM_DEVICE float below(float s, float top) const { return difference(s, top); }

  // `below` for scores of which `all_small` holds: on the FMA units alone, beside exp2 on the other one.
  FM_DEVICE float below_small(float s, float top) const {
    const float x = s * s;
    return fmaf(s, fmaf(fmaf(fmaf(c[3], x, c[2]), x, c[1]), x, c[0]), -natural(top) * kLog2e);
  }
  template <int kM, int kN>
  FM_DEVICE bool all_small(const float (&r_s)[kM][kN][4]) const {
    // Bits of positive floats compare as integers, and among all of them, as unsigned ones, the most negative
    // float is the largest.
    int high = 0;
    u32 low = 0;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          high = max(max(high, __float_as_int(r_s[m][n][e])), __float_as_int(r_s[m][n][e + 1]));
          low = max(max(low, __float_as_uint(r_s[m][n][e])), __float_as_uint(r_s[m][n][e + 1]));
        }
    return __all_sync(0xffffffffu,
                      fmaxf(__int_as_float(high), fabsf(__uint_as_float(low))) * to_tanh <= kLimit);
  }
};

// The same for bf16 and a softcap up to 56: exponents lie within 81 of 0, and less half the softcap between
// -122 and 41, where neither products nor sums leave the range of fp32, which bf16 shares. So nothing else is
// subtracted, and no maximum is looked for. Scores are those of scaled queries: two coefficients are enough
// below 2, which is one bit of a float, so that whether all scores are below takes one OR for two of them,
// half of what a maximum costs.
struct BoundedSoftcapExponent {
  static constexpr bool kCurved = true, kBounded = true;
  static constexpr float kLag = 0.f;
  // |argument| of tanh up to which four coefficients have a relative error of 2e-6
  static constexpr float kLong = 0.6f;
  float softcap, to_tanh;
  const float (&c)[4], (&c_short)[2];

  FM_DEVICE float natural() const { return 0.5f * softcap; }  // what is subtracted
  FM_DEVICE float below(float s) const { return softcap * kLog2e * (tanh_exp2(s * to_tanh) - 0.5f); }
  FM_DEVICE float below_short(float s) const {
    return fmaf(s, fmaf(c_short[1], s * s, c_short[0]), -0.5f * kLog2e * softcap);
  }
  FM_DEVICE float below_long(float s) const {
    const float x = s * s;
    return fmaf(s, fmaf(fmaf(fmaf(c[3], x, c[2]), x, c[1]), x, c[0]), -0.5f * kLog2e * softcap);
  }

  // Whether two coefficients are enough for the scores of the warp. Four chains, or they would wait for
  // themselves.
  template <int kM, int kN>
  FM_DEVICE bool all_short(const float (&r_s)[kM][kN][4]) const {
    u32 bits[4] = {0, 0, 0, 0};
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          bits[n % 2 * 2 + e / 2] |= __float_as_uint(r_s[m][n][e]) | __float_as_uint(r_s[m][n][e + 1]);
    constexpr u32 kTwoOrMore = 0x40000000;  // the highest bit of the exponent
    return __all_sync(0xffffffffu, ((bits[0] | bits[1] | bits[2] | bits[3]) & kTwoOrMore) == 0);
  }
  template <int kM, int kN>
  FM_DEVICE bool all_long(const float (&r_s)[kM][kN][4]) const {
    int most = 0;  // bits of positive floats compare as integers
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) most = max(most, __float_as_int(r_s[m][n][e]) & 0x7fffffff);
    return __all_sync(0xffffffffu, __int_as_float(most) * to_tanh <= kLong);
  }
};

// State of the 2 * kM rows that one thread holds: kM accumulator tiles of 16 rows, rows g and g + 8 of each.
template <int kM>
struct OnlineSoftmax {
  float r_max[2 * kM];  // shared by the quad, in units of the scores; -inf: no key yet
  float r_sum[2 * kM];  // this thread's columns only, until finish()

  FM_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) r_max[i] = -infinity(), r_sum[i] = 0.f;
  }

  // Scores become exp(scale * (s - max)); `correction` is what earlier sums and outputs must be multiplied
  // by. kWide: scores may be so large (a bias of -3e38) that s * c overflows: the maximum is subtracted
  // first, one FADD more.
  template <bool kWide, int kN>
  FM_DEVICE void update(float (&r_s)[kM][kN][4], float scale, float (&correction)[2 * kM]) {
    const float c = scale * kLog2e;
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      float(&tile)[kN][4] = r_s[i / 2];
      const int e = (i & 1) * 2;
      float row_max = r_max[i];
#pragma unroll
      for (int n = 0; n < kN; ++n) row_max = fmaxf(row_max, fmaxf(tile[n][e], tile[n][e + 1]));
      row_max = quad_max(row_max);
      // A row that has seen no key yet keeps max = -inf; 0 in its place makes every exp2 below 0, not NaN.
      const float top = row_max == -infinity() ? 0.f : row_max;
      const float shift = top * c;
      auto exponential = [&](float s) { return exp2_approx(kWide ? (s - top) * c : fmaf(s, c, -shift)); };
      correction[i] = exp2_approx((r_max[i] - top) * c);  // exactly 1 when the maximum stays
      r_max[i] = row_max;
      float sum = r_sum[i] * correction[i];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        tile[n][e] = exponential(tile[n][e]);
        tile[n][e + 1] = exponential(tile[n][e + 1]);
        sum += tile[n][e] + tile[n][e + 1];
      }
      r_sum[i] = sum;
    }
  }

  // `update` in two halves, between which other work fits. The maximum here stays where it is until it would
  // grow by more than 2^8 in the exponent (FlashAttention-4): sums and outputs then need no correction in
  // nearly every tile, and the last division makes up for what the maximum lags behind. `correction` is
  // exactly 1 where the maximum stays.
  template <class Exponent, int kN>
  FM_DEVICE void raise_max(const float (&r_s)[kM][kN][4], const Exponent& exponent,
                           float (&correction)[2 * kM]) {
    bool positive = true;
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) positive &= r_max[i] >= 0.f;
    float row_max[2 * kM];
    if (__all_sync(0xffffffffu, positive)) {
      // With a maximum that is not negative, floats compare like the integers of their bits, of which one
      // instruction takes three.
      tile_max(r_s, row_max,
               [](float a, float b) { return __int_as_float(max(__float_as_int(a), __float_as_int(b))); });
    } else {
      tile_max(r_s, row_max, [](float a, float b) { return fmaxf(a, b); });
    }
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      row_max[i] = quad_max(row_max[i]);
      const float old = r_max[i];
      if (exponent.difference(row_max[i], old) > Exponent::kLag) r_max[i] = row_max[i];
      correction[i] = exp2_approx(exponent.difference(old, top(i)));
      r_sum[i] *= correction[i];
    }
  }

  // The maximum of each of the thread's rows and r_max.
  template <int kN, class F>
  FM_DEVICE void tile_max(const float (&r_s)[kM][kN][4], float (&row_max)[2 * kM], F&& larger) const {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      const float(&tile)[kN][4] = r_s[i / 2];
      const int e = (i & 1) * 2;
      float chain[2] = {r_max[i], r_max[i]};  // one chain would wait for itself
#pragma unroll
      for (int n = 0; n < kN; ++n) chain[n & 1] = larger(larger(chain[n & 1], tile[n][e]), tile[n][e + 1]);
      row_max[i] = larger(chain[0], chain[1]);
    }
  }

  // Scores become exp2(exponent of s - exponent of the maximum), and the sums grow.
  template <class Exponent, int kN>
  FM_DEVICE void exponentiate(float (&r_s)[kM][kN][4], const Exponent& exponent) {
    if constexpr (Exponent::kCurved) {
      if (exponent.all_small(r_s)) {
        exponentiate_by(r_s, [&](float s, float top) { return exponent.below_small(s, top); });
        return;
      }
    }
    if constexpr (Exponent::kWide) {
      bool near = true;
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) near &= fabsf(top(i)) < Exponent::kFar;
      if (!__all_sync(0xffffffffu, near)) {
        exponentiate_by(r_s, [&](float s, float top) { return exponent.difference(s, top); });
        return;
      }
    }
    exponentiate_by(r_s, [&](float s, float top) { return exponent.below(s, top); });
  }
  template <int kN, class F>
  FM_DEVICE void exponentiate_by(float (&r_s)[kM][kN][4], F&& below) {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) {
        auto exponential = [&](float& s) { return s = exp2_approx(below(s, top(i))); };
        const int e = (i & 1) * 2;
        r_sum[i] += exponential(r_s[i / 2][n][e]) + exponential(r_s[i / 2][n][e + 1]);
      }
  }

  // A row that has seen no key yet keeps max = -inf; 0 in its place makes every exp2 below 0, not NaN.
  FM_DEVICE float top(int i) const { return r_max[i] == -infinity() ? 0.f : r_max[i]; }

  // Joins each row's sink logit (natural units; -inf = none), then gives the factor of the output and the
  // natural logarithm of the sum.
  template <class Exponent>
  FM_DEVICE void finish(const Exponent& exponent, const float (&sink)[2 * kM], float (&out_scale)[2 * kM],
                        float (&lse)[2 * kM]) const {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      // -inf * 0 would be NaN.
      const float row = r_max[i] == -infinity() ? -infinity() : exponent.natural(r_max[i]);
      const float top = fmaxf(row, sink[i]);
      const float shift = top == -infinity() ? 0.f : top;
      const float factor = exp2_approx((row - shift) * kLog2e);
      const float sum = fmaf(quad_sum(r_sum[i]), factor, exp2_approx((sink[i] - shift) * kLog2e));
      out_scale[i] = sum == 0.f ? 0.f : __fdividef(factor, sum);
      lse[i] = shift + log2_approx(sum) * kLn2;
    }
  }
};

// The same state for one accumulator tile where exponents are bounded: there is no maximum, and earlier sums
// never need a correction. Weights are rounded to bf16 before they meet v. In a row of few keys that shows,
// so its output is divided by the sum of the rounded weights; its lse is that of the others.
struct BoundedSoftmax {
  // A row that sees fewer keys has few. No tile of keys is smaller.
  enum { kFewKeys = 64 };
  float r_sum[2] = {0.f, 0.f};  // of this thread's columns, until finish(); more than 0 where a key was seen
  // What rounding has added to the sums of rows of few keys, as two bf16: a second register slows the loop of
  // whole tiles by 4 %.
  u32 r_added = 0;

  // Scores become weights, and the sums grow. Scores that do not count are not -inf here, which would be out
  // of every polynomial's range, but what q k is; mask() makes their weights 0. keys_of_row(i): how
  // many keys the row sees in all tiles. few_possible: the mask leaves no tile whole, so that rows may have
  // few keys.
  template <int kN, class KeysOfRow, class Mask>
  FM_DEVICE void exponentiate(float (&r_s)[1][kN][4], const BoundedSoftcapExponent& exponent,
                              bool few_possible, KeysOfRow&& keys_of_row, Mask&& mask) {
    static_assert(8 * kN >= kFewKeys);
    const bool any_few =
        few_possible && __any_sync(0xffffffffu, min(keys_of_row(0), keys_of_row(1)) < kFewKeys);
    auto all = [&](auto&& below) {
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) r_s[0][n][e] = exp2_approx(below(r_s[0][n][e]));
      mask();
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) r_sum[i] += r_s[0][n][2 * i] + r_s[0][n][2 * i + 1];
    };
    // Two coefficients would show in the lse of a row of few keys.
    if (!any_few && exponent.all_short(r_s)) all([&](float s) { return exponent.below_short(s); });
    else if (exponent.all_long(r_s)) all([&](float s) { return exponent.below_long(s); });
    else all([&](float s) { return exponent.below(s); });
    if (any_few) {
      float added[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        added[i] = bf16_of(r_added, i);
        if (keys_of_row(i) >= kFewKeys) continue;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float(&r)[4] = r_s[0][n];
          const u32 rounded = pack2<bf16>(r[2 * i], r[2 * i + 1]);
          added[i] += (bf16_of(rounded, 0) - r[2 * i]) + (bf16_of(rounded, 1) - r[2 * i + 1]);
        }
      }
      r_added = pack2<bf16>(added[0], added[1]);
    }
  }

  // As in OnlineSoftmax.
  FM_DEVICE void finish(const BoundedSoftcapExponent& exponent, const float (&sink)[2], float (&out_scale)[2],
                        float (&lse)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(r_sum[i]);
      float rounded_sum = sum;
      if (__any_sync(0xffffffffu, r_added != 0)) rounded_sum += quad_sum(bf16_of(r_added, i));
      const float row = sum == 0.f ? -infinity() : exponent.natural();
      const float top = fmaxf(row, sink[i]);
      const float shift = top == -infinity() ? 0.f : top;
      const float factor = exp2_approx((row - shift) * kLog2e),
                  of_sink = exp2_approx((sink[i] - shift) * kLog2e);
      const float divisor = fmaf(rounded_sum, factor, of_sink);
      out_scale[i] = divisor == 0.f ? 0.f : __fdividef(factor, divisor);
      lse[i] = shift + log2_approx(fmaf(sum, factor, of_sink)) * kLn2;
    }
  }

  // The first or the second of two bf16.
  FM_DEVICE static float bf16_of(u32 two, int i) {
    return __uint_as_float(i == 0 ? two << 16 : two & 0xffff0000u);
  }
};

}  // namespace fm
