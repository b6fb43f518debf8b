// The bias of a step in the Hopper kernels of attention's backward. As in the forward the copy engine brings
// it beside q or k, into the same stage, so that it needs no barrier of its own.
//
//   BwdBiasOfQueriesSm90      a value for each query and key; rows of the scores are queries, and the tile
//                             lies in shared memory as the forward's does
//   BwdBiasOfKeysSm90         the same where rows of the scores are keys. Rows in shared memory are queries
//                             still, as in memory: reading turns the tile
//   BwdKeyBiasOfQueriesSm90   a value for each key alone, and rows are queries
//   BwdKeyBiasOfKeysSm90      a value for each key alone, and rows are keys: two values for a thread
//
// Each has load(), for one thread that has told s_full of kLoaded bytes, and add(), which turns a warp's
// products into scale * product + bias: in natural units. kGradient: store_gradient() writes dS into dbias,
// for a bias that no two scores share.
#pragma once
#include "attention/bias_sm90.cuh"
#include "attention/bwd_params.cuh"
#include "math/softmax.cuh"

namespace fm {

// What a kernel asks where its variant has no bias.
struct NoBwdBias {
  using Params = AttentionBwdSm90Params;
  enum : bool { kUsed = false, kGradient = false };
  enum : int { kBytes = 0, kConsumerBytes = 0 };
  enum : u32 { kLoaded = 0 };
  template <class P>
  FM_DEVICE static void load(const P&, u32, u32, int, int, int, int) {}
};

// Boxes of 128 bytes of keys and kBoxQueries queries, those of the same queries one behind the other. query,
// key: the tile's first ones.
template <class Value, int kQueries, int kKeys, int kBoxQueries, class P>
FM_DEVICE void load_bias_tile(const P& p, u32 s_stage, u32 s_full, int query, int key, int head, int batch) {
  constexpr int kColumns = 128 / static_cast<int>(sizeof(Value)), kPanels = kKeys / kColumns;
  static_assert(kKeys % kColumns == 0 && kQueries % kBoxQueries == 0, "whole panels");
  const u64 policy = createpolicy_evict_normal();  // other heads or batch entries may use it, too
#pragma unroll 1
  for (int i = 0; i < kQueries / kBoxQueries; ++i)
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      tma_load_4d(s_stage + (i * kPanels + panel) * kBoxQueries * 128, p.bias_map, s_full, policy,
                  key + panel * kColumns, query + i * kBoxQueries, head, batch);
}

template <class Value, int kRows, int kCols>
struct BwdBiasOfQueriesSm90 : AttentionBiasSm90<Value, kRows, kCols> {
  using Params = AttentionBwdBiasedSm90Params;
  using Base = AttentionBiasSm90<Value, kRows, kCols>;
  enum : bool { kGradient = true };
  template <class P>
  FM_DEVICE static void load(const P& p, u32 s_stage, u32 s_full, int query, int key, int head, int batch) {
    load_bias_tile<Value, kRows, kCols, 64>(p, s_stage, s_full, query, key, head, batch);
  }

  // A warp's dS, to where its bias was, and from there to dbias. r_ds: packed. s_tile: the consumer's part of
  // the stage; row: the warp's first among the 64; query, key: of the array, the warp's first ones. The stage
  // may be given back when lane 0's bulk group has been read.
  template <class P, int kN>
  FM_DEVICE static void store_gradient(const P& p, const float (&r)[kN][4], const u32 (&r_ds)[kN / 2][4],
                                       u32 s_tile, int row, int query, int key, int head, int batch) {
    const int lane = lane_id();
    if constexpr (sizeof(Value) == 2) {
      const int mine = row + (lane & 15), swizzle = (mine & 7) ^ (lane >> 4);
#pragma unroll
      for (int n = 0; n < kN; n += 2)
        stmatrix_x4(s_tile + mine * 128 + n / 8 * Base::kPanelBytes + ((n % 8 ^ swizzle) << 4), r_ds[n / 2]);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int mine = row + i * 8 + (lane >> 2), swizzle = (mine & 7) ^ (lane >> 1 & 1);
        const u32 s_row = s_tile + mine * 128 + (lane & 1) * 8;
#pragma unroll
        for (int n = 0; n < kN; ++n)
          st_shared_v2_f32(s_row + n / 4 * Base::kPanelBytes + ((n % 4 * 2 ^ swizzle) << 4), r[n][2 * i],
                           r[n][2 * i + 1]);
      }
    }
    fence_proxy_async();
    __syncwarp();
    if (lane != 0) return;
#pragma unroll
    for (int panel = 0; panel < Base::kPanels; ++panel)
      tma_store_4d(p.dbias_map, s_tile + row * 128 + panel * Base::kPanelBytes, key + panel * Base::kColumns,
                   query, head, batch);
    bulk_commit_group();
  }
};

template <class Value, int kRows, int kCols>
struct BwdBiasOfKeysSm90 {
  using Params = AttentionBwdBiasedSm90Params;
  enum : bool { kUsed = true, kGradient = false };
  enum : int {
    kSize = static_cast<int>(sizeof(Value)),
    kPanelBytes = kCols * 128,
    kConsumerBytes = 64 * kSize / 128 * kPanelBytes,  // of 64 keys
    kBytes = kRows / 64 * kConsumerBytes              // of a stage
  };
  enum : u32 { kLoaded = kBytes };

  template <class P>
  FM_DEVICE static void load(const P& p, u32 s_stage, u32 s_full, int query, int key, int head, int batch) {
    load_bias_tile<Value, kCols, kRows, kCols>(p, s_stage, s_full, query, key, head, batch);
  }

  // s_tile: of the consumer's 64 keys; row: the warp's first key among them.
  template <int kN>
  FM_DEVICE static void add(float (&r_s)[kN][4], float scale, u32 s_tile, int row) {
    const int lane = lane_id();
    if constexpr (kSize == 2) {
      // Four matrices of 8 queries by 8 keys, turned: keys 0 to 7 and 8 to 15 of two blocks of 8 queries.
      static_assert(kN % 2 == 0);
      const int query = (lane >> 4) * 8 + (lane & 7), chunk = row / 8 + (lane >> 3 & 1);
      const u32 s_query = s_tile + query * 128 + ((chunk ^ (query & 7)) << 4);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        u32 r[4];
        ldmatrix_x4_trans(r, s_query + n * 8 * 128);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float (&s)[4] = r_s[n + j / 2];
          s[j % 2 * 2] = fmaf(s[j % 2 * 2], scale, low_of<Value>(r[j]));
          s[j % 2 * 2 + 1] = fmaf(s[j % 2 * 2 + 1], scale, high_of<Value>(r[j]));
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = row + e / 2 * 8 + (lane >> 2), query = (lane & 3) * 2 + e % 2;
        const u32 s_value =
            s_tile + key / 32 * kPanelBytes + query * 128 + ((key % 32 / 4 ^ query) << 4) + key % 4 * 4;
#pragma unroll
        for (int n = 0; n < kN; ++n)
          r_s[n][e] = fmaf(r_s[n][e], scale, __uint_as_float(ld_shared_b32(s_value + n * 8 * 128)));
      }
    }
  }
};

// Of kKeys keys; all queries have the same row.
template <class Value, int kKeys>
struct BwdKeyBiasOfQueriesSm90 : AttentionKeyBiasSm90<Value, kKeys> {
  using Params = AttentionBwdBiasedSm90Params;
  enum : bool { kGradient = false };
  template <class P>
  FM_DEVICE static void load(const P& p, u32 s_stage, u32 s_full, int, int key, int head, int batch) {
    tma_load_4d(s_stage, p.bias_map, s_full, createpolicy_evict_last(), key, 0, head, batch);
  }
};

template <class Value, int kKeys>
struct BwdKeyBiasOfKeysSm90 : BwdKeyBiasOfQueriesSm90<Value, kKeys> {
  enum : int { kSize = static_cast<int>(sizeof(Value)), kConsumerBytes = 64 * kSize };

  // s_tile: of the consumer's 64 keys; row: the warp's first key among them.
  template <int kN>
  FM_DEVICE static void add(float (&r_s)[kN][4], float scale, u32 s_tile, int row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = row + i * 8 + (lane_id() >> 2);
      const u32 found = ld_shared_b32(s_tile + key * kSize / 4 * 4);
      float bias;
      if constexpr (kSize == 4)
        bias = __uint_as_float(found);
      else
        bias = key % 2 == 0 ? low_of<Value>(found) : high_of<Value>(found);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e) r_s[n][e] = fmaf(r_s[n][e], scale, bias);
    }
  }
};

// The unit of lse where it is kept for the scores to come. With a bias both may be near the end of fp32's
// range, so that their difference comes before the unit of exp2.
template <class Bias>
FM_DEVICE constexpr float lse_unit() {
  return Bias::kUsed ? 1.f : kLog2e;
}

template <class Element, class Variant, int kRows, int kCols, bool kByKey>
FM_DEVICE auto bwd_bias_of() {
  using Value = decltype(pick<Variant::kBiasBytes == 2>(Element(), fp32()));
  if constexpr (Variant::kBiasBytes == 0)
    return NoBwdBias();
  else if constexpr (Variant::kKeyBias && kByKey)
    return BwdKeyBiasOfKeysSm90<Value, kRows>();
  else if constexpr (Variant::kKeyBias)
    return BwdKeyBiasOfQueriesSm90<Value, kCols>();
  else if constexpr (kByKey)
    return BwdBiasOfKeysSm90<Value, kRows, kCols>();
  else
    return BwdBiasOfQueriesSm90<Value, kRows, kCols>();
}
// kByKey: rows of the scores are keys.
template <class Element, class Variant, int kRows, int kCols, bool kByKey>
using BwdBiasOf = decltype(bwd_bias_of<Element, Variant, kRows, kCols, kByKey>());

}  // namespace fm
