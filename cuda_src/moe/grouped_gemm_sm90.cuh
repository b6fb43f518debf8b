// Products of groups of rows with a matrix for each group, for Hopper (sm_90a): the same function as
// grouped_gemm_sm80.cuh, for bf16 and fp16 rows that start at multiples of 16 bytes.
//
//   out[r] = act(x[row(r)] w[e]^T * weight(r) + bias[e])    for the rows r of group e
//
// Overwrites the rows of out that belong to a group, touches no others. fp32 accumulation, one rounding at
// the end, one warpgroup from the first to the last k: the same bits in every run, and for a row whatever the
// other rows are.
//
// Blocks stay on their SM and take tiles of kBlockM rows and kBlockN weight rows (with kGated half of them
// gate, half up: a thread then holds both of a pair). One warp (the scheduler) finds the tiles, since only
// the device knows the groups; one thread (the loader) lets the copy engine fill a ring of steps along k;
// where rows are gathered, two warps fetch them by cp.async, because Hopper's copy engine cannot gather. Each
// warpgroup but the first is a consumer: they share a tile, 64 rows each, or (kPingPong) take whole tiles in
// turn, so that one writes while the other multiplies. Tiles of 8 rows (kEightRows) leave room for more
// steps: they are multiplied eight times, as 64 rows, and the first warp writes them. The ring runs on across
// tiles, so that the loads of the next one are under way while this one is written. Two blocks of a cluster
// take tiles of rows that lie one behind the other and share their weights: each loads half and sends it to
// both (moe/schedule.cuh says what they do at the end of a group). Or (p.share_rows) they take the same rows
// and share these.
//
// The kernel may start before the grid in front of it has ended (programmatic dependent launch). It waits for
// it before anything else, or, where that grid only makes x (p.groups_known_early), between its first weights
// and its first rows. If that grid is a product of this kind, it counts the rows that it has written
// (p.rows_counted), and this one begins with the groups that are complete, while the last blocks of the other
// still multiply. Where that grid makes the groups, too, this one lets L2 fetch the first weights that each
// block needs if every group has one tile of rows (p.prefetch_k): most do then, and otherwise only the fetch
// was in vain.
#pragma once
#include "moe/activation.cuh"
#include "moe/next_weights.cuh"
#include "moe/params.cuh"
#include "moe/schedule.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/global_memory.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/epilogue.cuh"
#include "tile/pipeline.cuh"
#include "tile/smem.cuh"
#include "tile/warpgroup_gemm.cuh"

namespace fm {

template <class Element_, int kBlockM_, int kBlockN_, int kBlockK_, int kStages_, int kCluster_,
          bool kPingPong_, bool kGather_, bool kGated_>
struct GroupedGemmSm90 {
  using Element = Element_;
  using Params = GroupedGemmSm90Params;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kBlockK = kBlockK_, kStages = kStages_,
                       kCluster = kCluster_;
  static constexpr bool kPingPong = kPingPong_, kGather = kGather_, kGated = kGated_;
  static constexpr int kConsumers = kPingPong ? 2 : div_up(kBlockM, 64), kThreads = 128 * (1 + kConsumers);
  static constexpr int kSharers = kPingPong ? 1 : kConsumers;   // consumers that use a step
  static constexpr int kParts = div_up(kBlockM, 64 * kSharers);  // of 64 rows that one multiplies
  enum : bool { kEightRows = kBlockM == 8 };
  enum : int { kWriters = kEightRows ? 1 : 4 * kConsumers };  // warps that have rows
  static constexpr int kProducerRegisters = kGather ? 72 : 40, kConsumerRegisters = kGather ? 216 : 232;
  static constexpr int kColumns = kGated ? kBlockN / 2 : kBlockN;  // of out in a tile
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= launch_registers(1 + kConsumers));
  static_assert(kCluster == 1 || kCluster == 2, "a block loads one half of the weights for both, or both");
  static_assert(kConsumers <= 2, "three would want more registers than a block has");
  static_assert(kBlockN % 32 == 0, "gate and up are whole periods of the swizzle, and pairs of 8 columns");

  // Named barriers of the block: consumer i waits at number i for its turn.
  enum Barrier { kTurn = 1 };
  static_assert(kTurn + kConsumers <= kNamedBarriers);

  using TileX = SmemTile<Element, kBlockM, kBlockK>;
  // Gate or up, or half of the columns; the two lie panel by panel.
  using TileW = SmemTile<Element, kBlockN / 2, kBlockK>;
  static constexpr int kWorks = kCluster > 1 ? 4 : 3;     // tiles that the scheduler may be ahead
  struct Work {
    GroupTile tile;
    int more;  // 1: there is such a tile; 0: there is no more work
  };
  struct Smem {
    static constexpr int kX = 0, kW = kX + kStages * TileX::kBytes, kOut = kW + kStages * 2 * TileW::kBytes;
    static constexpr int kWork = kOut + kWriters * kStagedBytes,
                         kSorted = kWork + kWorks * static_cast<int>(sizeof(Work));
    static constexpr int kBarriers = kSorted + GroupCursor<kBlockM>::kSortedBytes;
    static constexpr int kBarriersWork = kBarriers + RingBarriers<kStages>::kBytes;
    // What TileNumbers exchanges between the blocks of a cluster, or with the loader.
    static constexpr int kDealt = kBarriersWork + RingBarriers<kWorks>::kBytes, kAsked = kDealt + 8;
    static constexpr int kNumber = kAsked + 8;
    static constexpr int kBytes = kNumber + 16;
    static_assert(kBytes <= kMaxSmemBytes);
  };
  using TileBias = Bias<kBlockN / 8, kGated>;
  using RingStep = Ring<kStages>;
  using RingWork = Ring<kWorks>;
  static constexpr int kGatherWarps = kGather ? 2 : 0;

  struct Rings {
    RingBarriers<kStages> steps;
    RingBarriers<kWorks> works;
    FM_DEVICE explicit Rings(u32 s_base)
        : steps{s_base + Smem::kBarriers}, works{s_base + Smem::kBarriersWork} {}
  };

  template <class Given>  // Params, or Clamped
  FM_DEVICE static void run(const Given& p) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 s_base = smem_address(smem);
    const Rings rings(s_base);
    if (threadIdx.x == 0) {
      if constexpr (!kGather) prefetch_tensormap(p.x_map);
      prefetch_tensormap(p.w_map), prefetch_tensormap(p.out_map);
      rings.steps.init(1 + 32 * kGatherWarps, 4 * kSharers * kCluster);
      rings.works.init(32, 1 + 32 * kGatherWarps + 128 * kConsumers);  // all who write or read a record
      mbarrier_init(s_base + Smem::kDealt, 1), mbarrier_init(s_base + Smem::kAsked, 1);
      fence_mbarrier_init();
      if (p.prefetch_k) prefetch_w(p);
    }
    meet();
    if (kGather || !p.groups_known_early) griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const int warp = warp_id();
    Work* s_works = reinterpret_cast<Work*>(smem + Smem::kWork);
    int* s_sorted = reinterpret_cast<int*>(smem + Smem::kSorted);
    if (warp < 4) {
      if constexpr (kConsumers == 2) setmaxnreg_dec<kProducerRegisters>();
      if (warp == 0 && lane_id() == 0) load(p, s_works, rings, s_base);
      if (warp == 1) schedule(p, s_works, s_sorted, rings.works, s_base);
      if (kGather && warp >= 2) gather(p, s_works, s_sorted, rings, s_base, warp - 2);
    } else {
      if constexpr (kConsumers == 2) setmaxnreg_inc<kConsumerRegisters>();
      consume(p, s_works, rings, s_base, warp / 4 - 1);
    }
    if constexpr (kCluster > 1) meet();  // nobody leaves while the other one may still write here
  }

  FM_DEVICE static void meet() {
    if constexpr (kCluster > 1) __syncwarp(), barrier_cluster_arrive(), barrier_cluster_wait();
    else __syncthreads();
  }

  // ---- scheduler ----

  // One warp. It also says which rows are written: of a tile when all consumers are done with its record.
  FM_DEVICE static void schedule(const Params& p, Work* s_works, int* s_sorted,
                                 const RingBarriers<kWorks>& ring, u32 s_base) {
    GroupCursor<kBlockM, kCluster> cursor(s_sorted);
    const int rank = kCluster > 1 ? cluster_ctarank() : 0;
    RingWork at;
    TileNumbers<kCluster> numbers(p, rank);
    int records = 0, group = -1;
    for (bool found = true; found; at.advance(), ++records) {
      ring.wait_empty(at);
      Work& w = s_works[at.stage];
      if (records >= kWorks) announce(p, w.tile);
      GroupTile tile;
      found = cursor.find(p, numbers.next(p, rank, s_base + Smem::kDealt), tile, rank);
      // A later tile is given out when its rows are there; for the first the loader waits, behind its
      // weights.
      if (found && p.rows_counted > kNoCounts && records > 0 && tile.group != group) wait_for_rows(p, tile);
      group = tile.group;
      if (found) w.tile = tile;
      w.more = found;
      mbarrier_arrive(ring.full(at.stage));
    }
    if (!announces(p)) return;
    for (int i = 0; i < kWorks - 1; ++i, at.advance())
      if (records + i >= kWorks) ring.wait_empty(at), announce(p, s_works[at.stage].tile);
  }

  FM_DEVICE static bool announces(const Params& p) { return p.rows_counted < kNoCounts; }
  FM_DEVICE static void announce(const Params& p, const GroupTile& tile) {
    const int rows = min(tile.rows, kBlockM);
    if (announces(p) && rows > 0 && lane_id() == 0)
      red_add_release_gpu_u32(p.counters + 2 + tile.group, rows);
    __syncwarp();
  }
  // Until the kernel in front of this one has written all rows of the tile's group.
  FM_DEVICE static void wait_for_rows(const Params& p, const GroupTile& tile) {
    const u32 wanted = static_cast<u32>(tile.group_rows) * p.rows_counted;
    while (ld_acquire_gpu_u32(p.counters + 2 + tile.group) != wanted) {}
    fence_proxy_async_global();  // copy engines and threads have written them, the copy engine reads them
  }

  // ---- loader ----

  // One thread.
  FM_DEVICE static void load(const Params& p, const Work* s_works, const Rings& rings, u32 s_base) {
    const int steps = div_up(p.k, kBlockK);
    const u32 rank = kCluster > 1 ? cluster_ctarank() : 0;
    RingStep at;
    RingWork works;
    bool waited = kGather;
    for (rings.works.wait_full(works); s_works[works.stage].more; rings.works.wait_full(works)) {
      const GroupTile tile = s_works[works.stage].tile;
      // The first weights travel while the grid before this one still writes x.
      const int ahead = waited ? 0 : min(steps, kStages);
      for (int step = 0; step < ahead; ++step) {
        mbarrier_arrive_expect_tx(rings.steps.full(step), 2 * TileW::kBytes + TileX::kBytes);
        load_w(p, tile, rings, s_base, rank, step, step);
      }
      if (!waited && p.rows_counted > kNoCounts) wait_for_rows(p, tile);
      if (!waited && p.rows_counted <= kNoCounts) griddepcontrol_wait();
      waited = true;
#pragma unroll 1
      for (int step = 0; step < steps; ++step, at.advance()) {
        if (step >= ahead) {
          rings.steps.wait_empty(at);
          mbarrier_arrive_expect_tx(rings.steps.full(at.stage),
                                    2 * TileW::kBytes + (kGather ? 0 : TileX::kBytes));
          load_w(p, tile, rings, s_base, rank, at.stage, step);
        }
        if constexpr (!kGather) load_x(p, tile, rings, s_base, rank, at.stage, step);
        if (kCluster == 1 && TileNumbers<kCluster>::counted(p) && step == max(steps - kStages, 0))
          mbarrier_arrive(s_base + Smem::kAsked);
      }
      mbarrier_arrive(rings.works.empty(works.stage));
      works.advance();
    }
    if (!waited || p.rows_counted > kNoCounts)
      griddepcontrol_wait();  // a grid ends after the one in front of it
  }

  // All rows, or this block's half to both blocks of a cluster that share them.
  FM_DEVICE static void load_x(const Params& p, const GroupTile& tile, const Rings& rings, u32 s_base,
                               u32 rank, int stage, int step) {
    const u64 policy = tile.weights_once ? createpolicy_evict_last() : createpolicy_evict_normal();
#pragma unroll
    for (int panel = 0; panel < kBlockK / 64; ++panel) {
      const u32 s_panel = s_base + Smem::kX + stage * TileX::kBytes + panel * TileX::kPanelBytes;
      const int k = step * kBlockK + panel * 64, row = tile.row + tile.group * p.x_skip,
                half = rank * (kBlockM / 2);
      if (kCluster == 1 || p.share_rows == 0)
        tma_load_2d(s_panel, p.x_map, rings.steps.full(stage), policy, k, row);
      else
        tma_load_2d_multicast(s_panel + half * TileX::kRowBytes, p.x_map, rings.steps.full(stage), 3, policy,
                              k, row + half);
    }
  }

  // Both halves, or this block's one to both blocks of a cluster that share them.
  FM_DEVICE static void load_w(const Params& p, const GroupTile& tile, const Rings& rings, u32 s_base,
                               u32 rank, int stage, int step) {
    const int col = tile.n_block * kColumns;
    // Only this tile of rows asks for them, or many do.
    const u64 policy = tile.weights_once ? createpolicy_evict_first() : createpolicy_evict_last();
#pragma unroll
    for (int panel = 0; panel < kBlockK / 64; ++panel)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 s_half =
            s_base + Smem::kW + stage * 2 * TileW::kBytes + (panel * 2 + half) * TileW::kPanelBytes;
        const int k = step * kBlockK + panel * 64, which = kGated ? half : 0,
                  row = kGated ? col : col + half * (kBlockN / 2);
        if (kCluster == 1 || tile.own_columns)
          tma_load_4d(s_half, p.w_map, rings.steps.full(stage), policy, k, which, row, tile.group);
        else if (half == rank)
          tma_load_4d_multicast(s_half, p.w_map, rings.steps.full(stage), 3, policy, k, which, row,
                                tile.group);
      }
  }

  FM_DEVICE static void prefetch_w(const Params& p) {
    const int rank = kCluster > 1 ? cluster_ctarank() : 0, per_group = div_up(p.n_blocks, kCluster),
              index = blockIdx.x / kCluster;
    const int group = index / per_group, col = (index % per_group * kCluster + rank) * kColumns;
    if (group >= p.groups || col >= p.n) return;
    for (int k = 0; k < min(p.prefetch_k, p.k); k += 64)
      for (int half = 0; half < 2; ++half)
        tma_prefetch_4d(p.w_map, k, kGated ? half : 0, kGated ? col : col + half * (kBlockN / 2), group);
  }

  // ---- gathering ----

  // Two warps, each half of the rows; eight lanes fetch 128 bytes of a row. The copies report by themselves
  // when they have landed; the fence that the tensor cores need to see them is the consumer's.
  FM_DEVICE static void gather(const Params& p, const Work* s_works, const int* s_sorted, const Rings& rings,
                               u32 s_base, int warp) {
    constexpr int kRows = kBlockM / 2, kCopies = kRows / 4;
    const int steps = div_up(p.k, kBlockK), chunks = p.k / 8;
    const u32 row_chunks = static_cast<u32>(p.x_stride / 8);
    const int row = lane_id() / 8, column = lane_id() % 8;  // and every fourth row from there
    const u32 s_even = s_base + Smem::kX + TileX::offset(warp * kRows + row, column);
    const u32 s_odd = s_base + Smem::kX + TileX::offset(warp * kRows + row + 4, column);
    RingStep at;
    RingWork works;
    for (rings.works.wait_full(works); s_works[works.stage].more; rings.works.wait_full(works)) {
      u32 source[kCopies], exists = 0;  // where the lane's rows of x begin, in chunks; bit i: row i exists
      find_rows<kRows>(p, s_works[works.stage].tile, s_sorted, warp * kRows, row, row_chunks, source, exists);
      mbarrier_arrive(rings.works.empty(works.stage));
      works.advance();
#pragma unroll 1
      for (int step = 0; step < steps; ++step, at.advance()) {
        rings.steps.wait_empty(at);
#pragma unroll
        for (int panel = 0; panel < kBlockK / 64; ++panel) {
          const int chunk = (step * (kBlockK / 64) + panel) * 8 + column;
          const u8* g_chunk = static_cast<const u8*>(p.x) + chunk * 16;
          keep_register(g_chunk);  // or x is added again for every row
          const u32 here = chunk < chunks ? exists : 0,
                    s_panel = at.stage * TileX::kBytes + panel * TileX::kPanelBytes;
#pragma unroll
          for (int i = 0; i < kCopies; ++i)
            cp_async_cg_16((i % 2 == 0 ? s_even : s_odd) + s_panel + i / 2 * 8 * TileX::kRowBytes,
                           g_chunk + static_cast<u64>(source[i]) * 16, (here & 1u << i) != 0);
        }
        cp_async_mbarrier_arrive_noinc(rings.steps.full(at.stage));
      }
    }
    if (kEightRows && warp == 0 && p.next_rows != 0) prefetch_next_weights<Element>(p);
  }

  // For every fourth row from `row` on of the kRows rows from `first_row` on. A lane looks up one or two
  // rows, of which others need parts.
  template <int kRows>
  FM_DEVICE static void find_rows(const Params& p, const GroupTile& tile, const int* s_sorted, int first_row,
                                  int row, u32 row_chunks, u32 (&source)[kRows / 4], u32& exists) {
    int held[div_up(kRows, 32)];
#pragma unroll
    for (int i = 0; i < div_up(kRows, 32); ++i)
      held[i] = gathered_row(p, tile, first_row + i * 32 + lane_id(), s_sorted);
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int found = __shfl_sync(0xffffffffu, held[i / 8], i % 8 * 4 + row);
      source[i] = max(found, 0) * row_chunks;
      exists |= static_cast<u32>(found >= 0) << i;
    }
  }

  // ---- consumer ----

  template <class Given>
  FM_DEVICE static void consume(const Given& p, const Work* s_works, const Rings& rings, u32 s_base,
                                int consumer) {
    const int steps = div_up(p.k, kBlockK), first_row = kPingPong ? 0 : consumer * 64,
              warp_row = (warp_id() & 3) * 16;
    const u32 s_panels = s_base + Smem::kOut + (consumer * 4 + (warp_id() & 3)) * kStagedBytes;
    RingStep at;
    RingWork works;
    int turn = 0;
    int written = -1;  // the record of the tile whose stores are under way
    auto report = [&] {
      if (written < 0) return;
      if (lane_id() == 0) bulk_wait_group<0>();  // for which the tile's products have left time
      mbarrier_arrive(rings.works.empty(written));
      written = -1;
    };
    if (consumer == 0) pass_turn(1);  // the first turn is consumer 0's
    for (rings.works.wait_full(works); s_works[works.stage].more; rings.works.wait_full(works)) {
      // Read again after the products, which leave no registers for it.
      const GroupTile& tile = s_works[works.stage].tile;
      if (kPingPong && turn != consumer) {
        skip(at, steps);
      } else if (uniform(tile.rows) > first_row) {
        float r_out[kParts][kBlockN / 8][4];
        TileBias bias;
        bias.load(p, tile.group, tile.n_block * kColumns, tile.n_block * kColumns + kBlockN / 2);
        take_turn(consumer);
        multiply(rings, s_base, consumer, steps, at, r_out, report);
        if (!kEightRows || warp_row == 0)
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            write(p, tile, s_panels, first_row + part * 64 + warp_row, bias, r_out[part]);
        if (announces(p)) written = works.stage;
      } else {
        report();
        take_turn(consumer);
#pragma unroll 1
        for (int step = 0; step < steps; ++step, at.advance())
          rings.steps.wait_full(at), __syncwarp(), release(rings, at.stage);
        pass_turn(consumer);
      }
      if (written != works.stage) mbarrier_arrive(rings.works.empty(works.stage));
      works.advance();
      turn ^= 1;
    }
    report();
    if (lane_id() == 0) bulk_wait_group_read<0>();  // the block's shared memory ends with it
  }

  // The steps of a tile are waited for by one consumer after the other: who came earlier would take a
  // barrier's phase of some rounds before for the one it needs, since only the parity tells them apart.
  FM_DEVICE static void take_turn(int consumer) {
    if constexpr (kPingPong) barrier_sync(kTurn + consumer, 256);
  }
  FM_DEVICE static void pass_turn(int consumer) {
    if constexpr (kPingPong) barrier_arrive(kTurn + 1 - consumer, 256);
  }

  // The other consumer's steps.
  FM_DEVICE static void skip(RingStep& at, int steps) {
    const int behind = at.stage + steps, rounds = behind / kStages;
    at.stage = behind - rounds * kStages, at.parity ^= rounds & 1;
  }

  // meanwhile() is called while products are under way.
  template <class F>
  FM_DEVICE static void multiply(const Rings& rings, u32 s_base, int consumer, int steps, RingStep& at,
                                 float (&r_out)[kParts][kBlockN / 8][4], F&& meanwhile) {
    const int first_row = kPingPong ? 0 : consumer * 64;
    int before = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      rings.steps.wait_full(at);
      if constexpr (kGather) fence_proxy_async();  // what cp.async has written, for the tensor cores
      if (step == steps - 1) pass_turn(consumer);
      const KMajor<TileX> x(s_base + Smem::kX + at.stage * TileX::kBytes + first_row * TileX::kRowBytes);
      const KMajor<TileW, 2> w(s_base + Smem::kW + at.stage * 2 * TileW::kBytes);
      wgmma_fence();
      fm::multiply<Element, kBlockK>(r_out, x, w, step == 0);
      wgmma_commit_group();
      if (step == min(steps - 1, 1)) meanwhile();
      if (step != 0) {
        wait_for_products<1>(r_out);
        release(rings, before);
      }
      before = at.stage;
      at.advance();
    }
    wait_for_products<0>(r_out);
    release(rings, before);
  }

  // One lane per warp reports that the warp is done with a step, to all who load it.
  FM_DEVICE static void release(const Rings& rings, int stage) {
    if (lane_id() < kCluster) {
      if constexpr (kCluster == 1) mbarrier_arrive(rings.steps.empty(stage));
      else mbarrier_arrive_cluster(mapa(rings.steps.empty(stage), lane_id()));
    }
  }

  // 16 rows of a tile, from `warp_row` on.
  template <class Given>
  FM_DEVICE static void write(const Given& p, const GroupTile& tile, u32 s_panels, int warp_row,
                              const TileBias& bias, float (&r_out)[kBlockN / 8][4]) {
    const int col = tile.n_block * kColumns;
    const int rows = (kEightRows ? min(tile.rows, 8) : tile.rows) - warp_row;
    const float one[2] = {1.f, 1.f};
    scale_by_row_weights(p, tile.row + warp_row, rows, r_out);
    bias.add_to(p, r_out);
    const i64 first = static_cast<i64>(tile.row + warp_row) * p.out_stride + col;
    Element* g_rows = static_cast<Element*>(p.out) + first;
    const int row = tile.row + warp_row;
    const RowsOut<Element> to{&p.out_map, g_rows, p.out_stride, 0, rows, p.n - col, col, 0, row, 0, 0};
    if constexpr (kGated) activate_gated(p, r_out);
    else activate(p, r_out);
    store_accumulator_rows<kColumns / 8>(to, s_panels, r_out, one);
  }
};

}  // namespace fm
