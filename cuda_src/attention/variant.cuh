// What happens to a score between q.k and the softmax. A kernel is compiled for one variant and asks it for
//   kScore      false: scores stay q.k, and scale() folds into the exponent, so that nothing is paid
//   scale(p)    what turns the scores that apply() leaves into natural units (not SoftcapScores)
//   exponent(p) the same as an exponent of math/softmax.cuh
//   apply(...)  changes the tile of scores a thread holds, through for_each_score (kScore only)
//   kWide       true: scores may come near the end of fp32's range
//   kAligned    true: only inputs whose rows start at multiples of 16 bytes
//   kBounded    true: exponents are so small that nothing needs to be subtracted from them; queries are
//               multiplied by p.query_scale first
//   kBiasBytes  of a value of a bias whose tiles come beside those of K (bias_sm90.cuh); 0: none does
//   kKeyBias    true: that bias has a value for each key alone, which all queries of a head share
//   kOneLoop    true: plain steps have no loop of their own, since the code is slow to load and to compile
//   kFetchesBias  true: threads fetch a bias of any type and strides (bias_sm80.cuh)
//   kMask       true: a boolean mask comes as words of bits and as lists of the key tiles that it leaves
//               (mask_words.cuh)
// A new expression on scores is a new struct here (or in a generated translation unit); no kernel changes.
#pragma once
#include "attention/keys.cuh"
#include "attention/params.cuh"
#include "math/softmax.cuh"
#include "tile/mask.cuh"

namespace fm {

// Where a thread's accumulator values lie: row, col are those of the warp's first tile.
template <int kM, int kN, class F>
FM_DEVICE void for_each_score(float (&r_s)[kM][kN][4], int row, int col, F&& f) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          f(r_s[m][n][2 * i + e], row + m * 16 + i * 8 + g, col + n * 8 + 2 * t + e);
}

struct ScoresAlone {
  static constexpr int kBiasBytes = 0;
  static constexpr bool kMask = false, kFetchesBias = false, kKeyBias = false, kOneLoop = false;
};

struct PlainScores : ScoresAlone {
  static constexpr bool kScore = false, kWide = false, kAligned = true, kBounded = false;
  FM_DEVICE static float scale(const AttentionFwdParams& p) { return p.softmax_scale; }
  FM_DEVICE static LinearExponent<kWide> exponent(const AttentionFwdParams& p) { return {scale(p)}; }
};

// Softcap alone, and a positive scale: the scores stay q.k, the cap is part of the exponent.
struct SoftcapScores : ScoresAlone {
  static constexpr bool kScore = false, kWide = false, kAligned = true, kBounded = false;
  FM_DEVICE static SoftcapExponent exponent(const AttentionFwdSm90Params& p) {
    return {p.softcap, p.to_tanh, p.softcap_exponent};
  }
};

// The same for bf16 and a softcap up to 56.
struct BoundedSoftcapScores : SoftcapScores {
  static constexpr bool kBounded = true;
  FM_DEVICE static BoundedSoftcapExponent exponent(const AttentionFwdSm90Params& p) {
    return {p.softcap, p.to_tanh, p.softcap_exponent, p.softcap_short};
  }
};

// The same bits as PlainScores, for rows that start anywhere.
struct PlainScoresUnaligned : PlainScores {
  static constexpr bool kAligned = false;
};

// Softcap and ALiBi, each when the parameters ask for it; kBias: for scores to which the kernel adds a bias
// afterwards.
template <bool kBias>
struct ModifiedScores : ScoresAlone {
  static constexpr bool kScore = true, kWide = kBias, kAligned = false, kBounded = false;
  static constexpr bool kFetchesBias = kBias;
  // Whether scores stay in units of q.k, so that the scale costs nothing: only ALiBi is added, and it can be
  // added in those units.
  FM_DEVICE static bool folds(const AttentionFwdParams& p) {
    return !kBias && p.softcap == 0.f && p.softmax_scale > 0.f;
  }
  FM_DEVICE static float scale(const AttentionFwdParams& p) { return folds(p) ? p.softmax_scale : 1.f; }
  FM_DEVICE static LinearExponent<kWide> exponent(const AttentionFwdParams& p) { return {scale(p)}; }

  template <int kM, int kN>
  FM_DEVICE static void apply(const AttentionFwdParams& p, float (&r_s)[kM][kN][4], int batch, int head,
                              int row, int col, const BandMask& band) {
    if (!folds(p)) for_each_score(r_s, row, col, [&](float& s, int, int) { s *= p.softmax_scale; });
    if (p.softcap > 0.f) {
      const float inverse = 1.f / p.softcap;
      for_each_score(r_s, row, col, [&](float& s, int, int) { s = p.softcap * tanh_exp2(s * inverse); });
    }
    add_alibi(p, r_s, batch, head, row, col, band, scale(p));
  }

  // unit: what a score of 1 is in natural units.
  template <int kM, int kN>
  FM_DEVICE static void add_alibi(const AttentionFwdParams& p, float (&r_s)[kM][kN][4], int batch, int head,
                                  int row, int col, const BandMask& band, float unit) {
    if (p.alibi_slopes == nullptr) return;
    add_alibi(alibi_slope(p, batch, head) / unit, r_s, row, col, band);
  }
  FM_DEVICE static float alibi_slope(const AttentionFwdParams& p, int batch, int head) {
    return static_cast<const float*>(p.alibi_slopes)[static_cast<i64>(batch) * p.alibi_stride_b + head];
  }
  template <int kM, int kN>
  FM_DEVICE static void add_alibi(float slope, float (&r_s)[kM][kN][4], int row, int col,
                                  const BandMask& band) {
    // Distances from the thread's first score: one conversion to float for all.
    const float first = static_cast<float>(row + (lane_id() >> 2) + band.shift - col - 2 * (lane_id() & 3));
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          r_s[m][n][e] = fmaf(-slope, fabsf(first + static_cast<float>(m * 16 + e / 2 * 8 - n * 8 - e % 2)),
                              r_s[m][n][e]);
  }
};

// A bias whose tiles the kernel itself adds, as values of kBytes bytes: 2, of the type of the elements, or 4.
template <int kBytes>
struct BiasScores : ScoresAlone {
  static constexpr bool kScore = false, kWide = true, kAligned = true, kBounded = false;
  static constexpr bool kOneLoop = kBytes == 4;  // which reads so much that a second loop gains nothing
  static constexpr int kBiasBytes = kBytes;
  FM_DEVICE static float scale(const AttentionFwdParams&) { return 1.f; }
  FM_DEVICE static LinearExponent<kWide> exponent(const AttentionFwdParams&) { return {1.f}; }

  // What happens before the bias is added. Returns the factor that scores need then.
  template <int kM, int kN>
  FM_DEVICE static float prepare(const AttentionFwdParams& p, float (&r_s)[kM][kN][4], int batch, int head,
                                 int row, int col, const BandMask& band) {
    if (p.softcap == 0.f && p.alibi_slopes == nullptr) return p.softmax_scale;
    ModifiedScores<true>::apply(p, r_s, batch, head, row, col, band);
    return 1.f;
  }
};

// The same with a value for each key alone; without softcap and ALiBi.
template <int kBytes>
struct KeyBiasScores : BiasScores<kBytes> {
  static constexpr bool kKeyBias = true, kOneLoop = false;
  template <int kM, int kN>
  FM_DEVICE static float prepare(const AttentionFwdParams& p, float (&)[kM][kN][4], int, int, int, int,
                                 const BandMask&) {
    return p.softmax_scale;
  }
};

// Any scores under a boolean mask.
template <class Scores>
struct MaskScores : Scores {
  static constexpr bool kMask = true;
};

}  // namespace fm
