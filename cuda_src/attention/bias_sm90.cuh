// The bias of a tile of scores in the Hopper kernels. The copy engine brings it beside the tile of keys, into
// the same stage of the same ring, so that every element is read once for each head that uses it.
//
//   AttentionBiasSm90     a value for each query and key. In shared memory each consumer has 64 rows in
//                         panels of 128 bytes, swizzled. Packed heads lie side by side, as in a tile of Q.
//   AttentionKeyBiasSm90  a value for each key: all queries have the same row, and all heads that share keys.
//
// The copy engine reads from multiples of 16 bytes on only. Where keys begin behind padding, tiles of keys
// therefore begin up to kKeyStep - 1 rows before the first key; hide_keys takes those out of the scores.
#pragma once
#include "attention/params.cuh"
#include "attention/variant.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tma.cuh"

namespace fm {

// What a kernel asks where its variant has no bias.
struct NoBias {
  enum : bool { kUsed = false };
  enum : int { kBytes = 0, kKeyStep = 1 };
  enum : u32 { kLoaded = 0 };
  template <class Work>
  FM_DEVICE static void load(const AttentionFwdSm90Params&, const Work&, u32, u32, int) {}
};

// Scores of the first `keys` keys of a tile, at most 7, count no more.
template <int kN>
FM_DEVICE void hide_keys(float (&r_s)[kN][4], int keys) {
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if ((lane_id() & 3) * 2 + e % 2 < keys) r_s[0][e] = -infinity();
}

template <class Value, int kBlockM, int kBlockN>
struct AttentionBiasSm90 {
  using Params = AttentionFwdSm90Params;
  enum : bool { kUsed = true };
  enum : int {
    kConsumers = kBlockM / 64,
    kColumns = 128 / static_cast<int>(sizeof(Value)),  // of a panel
    kKeyStep = kColumns / 8,                           // columns in 16 bytes
    kPanels = kBlockN / kColumns,
    kPanelBytes = 64 * 128,
    kConsumerBytes = kPanels * kPanelBytes,
    kBytes = kConsumers * kConsumerBytes  // of a stage
  };
  enum : u32 { kLoaded = kBytes };  // bytes that load() brings
  static_assert(kBlockN % kColumns == 0, "whole panels");

  // One thread. Key tile n of the tile of queries w; the caller has told s_full of the bytes.
  template <class Work>
  FM_DEVICE static void load(const Params& p, const Work& w, u32 s_stage, u32 s_full, int n) {
    const u64 policy = createpolicy_evict_normal();  // other heads or batch entries may use it, too
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i)
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
        tma_load_5d(s_stage + i * kConsumerBytes + panel * kPanelBytes, p.bias_map, s_full, policy,
                    w.k_row + n * kBlockN + panel * kColumns, w.head % p.heads_per_key,
                    w.q_row + (i * 64 >> p.pack_bits), w.head_k, w.batch);
  }

  // Scores of a warp become scale * s + bias. s_tile: the consumer's part of the stage; row: the
  // warp's first among the 64.
  template <int kN>
  FM_DEVICE static void add(float (&r_s)[kN][4], float scale, u32 s_tile, int row) {
    const int lane = lane_id();
    if constexpr (sizeof(Value) == 2) {
      // ldmatrix hands out pairs of values as accumulators hold them: four matrices are rows 0 to 7 and 8 to
      // 15 of two neighbouring blocks of 8 columns.
      const int mine = row + (lane & 15), swizzle = (mine & 7) ^ (lane >> 4);
      const u32 s_row = s_tile + mine * 128;
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        u32 r[4];
        ldmatrix_x4(r, s_row + n / 8 * kPanelBytes + ((n % 8 ^ swizzle) << 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float(&s)[4] = r_s[n + j / 2];
          s[j % 2 * 2] = fmaf(s[j % 2 * 2], scale, low_of<Value>(r[j]));
          s[j % 2 * 2 + 1] = fmaf(s[j % 2 * 2 + 1], scale, high_of<Value>(r[j]));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int mine = row + i * 8 + (lane >> 2);
        const u32 s_row = s_tile + mine * 128 + (lane & 1) * 8;
        const int swizzle = (mine & 7) ^ (lane >> 1 & 1);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          float low, high;
          ld_shared_v2_f32(low, high, s_row + n / 4 * kPanelBytes + ((n % 4 * 2 ^ swizzle) << 4));
          r_s[n][2 * i] = fmaf(r_s[n][2 * i], scale, low);
          r_s[n][2 * i + 1] = fmaf(r_s[n][2 * i + 1], scale, high);
        }
      }
    }
  }
};

template <class Value, int kBlockN>
struct AttentionKeyBiasSm90 {
  using Params = AttentionFwdSm90Params;
  enum : bool { kUsed = true };
  enum : int {
    kSize = static_cast<int>(sizeof(Value)),
    kKeyStep = 16 / kSize,
    kConsumerBytes = 0,                        // all read the same row
    kBytes = div_up(kBlockN * kSize, 128) * 128  // of a stage
  };
  enum : u32 { kLoaded = kBlockN * kSize };

  template <class Work>
  FM_DEVICE static void load(const Params& p, const Work& w, u32 s_stage, u32 s_full, int n) {
    tma_load_5d(s_stage, p.bias_map, s_full, createpolicy_evict_last(), w.k_row + n * kBlockN, 0, 0, w.head_k,
                w.batch);
  }

  template <int kN>
  FM_DEVICE static void add(float (&r_s)[kN][4], float scale, u32 s_row, int) {
    const u32 s_pair = s_row + (lane_id() & 3) * 2 * kSize;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      float bias[2];
      if constexpr (kSize == 2) {
        const u32 pair = ld_shared_b32(s_pair + n * 8 * kSize);
        bias[0] = low_of<Value>(pair), bias[1] = high_of<Value>(pair);
      } else {
        ld_shared_v2_f32(bias[0], bias[1], s_pair + n * 8 * kSize);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) r_s[n][e] = fmaf(r_s[n][e], scale, bias[e % 2]);
    }
  }
};

template <class Element, class Variant, int kBlockM, int kBlockN>
FM_DEVICE auto attention_bias_of() {
  using Value = decltype(pick<Variant::kBiasBytes == 2>(Element(), fp32()));
  if constexpr (Variant::kBiasBytes == 0) return NoBias();
  else if constexpr (Variant::kKeyBias) return AttentionKeyBiasSm90<Value, kBlockN>();
  else return AttentionBiasSm90<Value, kBlockM, kBlockN>();
}
template <class Element, class Variant, int kBlockM, int kBlockN>
using AttentionBiasOf = decltype(attention_bias_of<Element, Variant, kBlockM, kBlockN>());

}  // namespace fm
