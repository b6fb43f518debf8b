// What a consumer of the Hopper kernels does with a tile of scores between the two products.
#pragma once
#include "attention/params.cuh"
#include "attention/variant.cuh"
#include "math/softmax.cuh"
#include "tile/mask.cuh"

namespace fm {

// tile_row: the warp's first row in the tile of queries; n: the tile of keys; in_band: the band hides none
// of its scores; whole: nor does the mask. Where exponents are bounded, the band comes after exp2.
template <class Variant, int kBlockN>
struct AttentionScoresSm90 {
  using Params = AttentionFwdSm90Params;
  using Softmax = decltype(pick<Variant::kBounded>(BoundedSoftmax(), OnlineSoftmax<1>()));

  // The words of a boolean mask for a thread's two rows.
  struct Words {
    u32 of[2];
  };
  template <class Work>
  FM_DEVICE static Words words_of(const Params& p, const Work& w, int tile_row, int n) {
    if constexpr (!Variant::kMask) return {};
    const int row = tile_row + (lane_id() >> 2);
    return {mask_word(p, w, row, n), mask_word(p, w, row + 8, n)};
  }

  // The variant's change of scores, and the mask.
  template <class Work, int kN>
  FM_DEVICE static void change(const Params& p, const Work& w, float (&r_s)[1][kN][4], int tile_row, int n,
                               bool whole, bool in_band, const Words& words) {
    if constexpr (Variant::kScore)
      Variant::apply(p, r_s, w.batch, w.head, w.m0 + tile_row, n * kBlockN, w.band);
    if (Variant::kBounded || whole) return;
    if constexpr (Variant::kMask) {
      ColumnsSeen seen;
#pragma unroll
      for (int i = 0; i < 2; ++i) seen[i][0] = words.of[i], seen[i][1] = words.of[i] >> 16;
      if (!in_band) within_band(seen, w.band, w.m0 + tile_row, n * kBlockN);
      mask_scores(r_s[0], seen);
    } else {
      mask_scores(r_s[0], w.band, w.m0 + tile_row, n * kBlockN);
    }
  }

  // Of row `row` of the tile of queries.
  template <class Work>
  FM_DEVICE static u32 mask_word(const Params& p, const Work& w, int row, int n) {
    const i64 query = min(w.m0 + row, w.band.rows - 1) >> p.pack_bits;
    return __ldg(p.mask_words + w.batch * p.mask_stride_b + w.head * p.mask_stride_h +
                 query * p.mask_stride_q + n * 4 + (lane_id() & 3));
  }

  // The bias's tile, where it comes beside the keys. s_bias: the consumer's part of the stage.
  template <class Bias, class Work, int kN>
  FM_DEVICE static void add_bias(const Params& p, const Work& w, float (&r_s)[1][kN][4], int tile_row, int n,
                                 u32 s_bias) {
    const float scale = Variant::prepare(p, r_s, w.batch, w.head, w.m0 + tile_row, n * kBlockN, w.band);
    Bias::add(r_s[0], scale, s_bias, tile_row % 64);
  }

  // Scores become weights, and the sums of rows grow. kPlain: no score of the tile is masked.
  template <bool kPlain = false, class Work, class Steps, int kN>
  FM_DEVICE static void exponentiate(const Params& p, Softmax& softmax, const Work& w, const Steps& steps,
                                     float (&r_s)[1][kN][4], int tile_row, int n) {
    if constexpr (Variant::kBounded) {
      const bool masked = !kPlain && !steps.whole(n);
      const int row = w.m0 + tile_row, col = n * kBlockN;
      auto keys_of_row = [&](int i) {
        const int r = row + i * 8 + (lane_id() >> 2);
        return w.band.last(r) - w.band.first(r) + 1;
      };
      softmax.exponentiate(r_s, Variant::exponent(p), !kPlain && !steps.any_whole(), keys_of_row, [&] {
        if (masked) mask_scores(r_s[0], w.band, row, col, 0.f);
      });
    } else {
      softmax.exponentiate(r_s, Variant::exponent(p));
    }
  }
};

}  // namespace fm
