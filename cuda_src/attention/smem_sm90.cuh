// What a block of the Hopper kernel keeps in shared memory: rings of tiles of Q, K and V (with the bias's
// beside K), room for what is stored, records of work, barriers.
#pragma once
#include "ptx/tma.cuh"
#include "tile/epilogue.cuh"
#include "tile/pipeline.cuh"
#include "tile/smem.cuh"
#include "tile/warpgroup_gemm.cuh"

namespace fm {

// kBiasBytes: of a stage; Work: a record, of which there are kWorks. s_base is the block's first address.
template <class Element, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStages, int kBiasBytes,
          class Work, int kWorks>
struct AttentionSmemSm90 {
  enum : int { kConsumers = kBlockM / 64 };
  using TileQ = SmemTile<Element, 64, div_up(kHeadDim, 64) * 64>;  // of one consumer
  using TileK = SmemTile<Element, kBlockN, div_up(kHeadDim, 64) * 64>;
  using TileV = SmemTile<Element, kBlockN, div_up(kHeadDimV, 64) * 64>;

  enum { kRecordBytes = 1536 };  // the most that records and barriers need: decides what else fits
  static constexpr int kQ = 0;
  static constexpr int kKeys = kStages * (TileK::kBytes + TileV::kBytes + kBiasBytes);
  // Whether there is room through which results are stored. Large tiles of keys are worth more than that.
  static constexpr bool kStaged =
      kConsumers * (TileQ::kBytes + 4 * kStagedBytes) + kKeys + kRecordBytes <= kMaxSmemBytes;
  static constexpr int kOutBytes = kStaged ? 4 * kStagedBytes : 0;  // of one consumer
  static constexpr int kRest = kKeys + kConsumers * kOutBytes + kRecordBytes;
  static constexpr int kQStages = 2 * kConsumers * TileQ::kBytes + kRest <= kMaxSmemBytes ? 2 : 1;
  static constexpr int kK = kQ + kQStages * kConsumers * TileQ::kBytes, kV = kK + kStages * TileK::kBytes;
  static constexpr int kOut = kV + kStages * TileV::kBytes, kBias = kOut + kConsumers * kOutBytes;
  static constexpr int kWork = kBias + kStages * kBiasBytes;
  static constexpr int kBarriers = kWork + kWorks * static_cast<int>(sizeof(Work));
  static constexpr int kBarriersQ = kBarriers;
  static constexpr int kBarriersK = kBarriersQ + kConsumers * RingBarriers<kQStages>::kBytes;
  static constexpr int kBarriersV = kBarriersK + RingBarriers<kStages>::kBytes;
  static constexpr int kBarriersWork = kBarriersV + RingBarriers<kStages>::kBytes;
  static constexpr int kBytes = kBarriersWork + RingBarriers<kWorks>::kBytes;
  static_assert(kBytes <= kMaxSmemBytes && kBytes - kWork <= kRecordBytes);

  using RingQ = Ring<kQStages>;
  using RingKV = Ring<kStages>;
  using RingWork = Ring<kWorks>;

  // The rings of one block, for both sides.
  struct Rings {
    u32 s_q;
    RingBarriers<kStages> k, v;
    RingBarriers<kWorks> work;
    FM_DEVICE explicit Rings(u32 s_base)
        : s_q(s_base + kBarriersQ),
          k{s_base + kBarriersK},
          v{s_base + kBarriersV},
          work{s_base + kBarriersWork} {}
    FM_DEVICE RingBarriers<kQStages> q(int consumer) const {
      return {s_q + consumer * RingBarriers<kQStages>::kBytes};
    }
  };

  FM_DEVICE static u32 query_tile(u32 s_base, int consumer, const RingQ& q) {
    return s_base + kQ + (q.stage * kConsumers + consumer) * TileQ::kBytes;
  }
  // The operands of the products.
  FM_DEVICE static KMajor<TileQ> queries(u32 s_base, int consumer, const RingQ& q) {
    u32 s_q = query_tile(s_base, consumer, q);
    keep_register(s_q);  // or every step of the product gets registers of its own, for the whole loop
    return KMajor<TileQ>(s_q);
  }
  FM_DEVICE static KMajor<TileK> keys(u32 s_base, const RingKV& k) {
    return KMajor<TileK>(s_base + kK + k.stage * TileK::kBytes);
  }
  FM_DEVICE static MNMajor<TileV> values(u32 s_base, const RingKV& v) {
    return MNMajor<TileV>(s_base + kV + v.stage * TileV::kBytes);
  }
};

}  // namespace fm
