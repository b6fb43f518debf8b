// What the Hopper kernels do with a finished tile: sinks, the rows of out and lse, and the rows that belong
// to no sequence.
#pragma once
#include "attention/keys.cuh"
#include "tile/epilogue.cuh"

namespace fm {

template <class Element, int kHeadDimV, class Keys>
struct AttentionEpilogueSm90 {
  using Params = AttentionFwdSm90Params;

  // The sinks of a thread's two rows, in natural units; -inf: none. Heads that are packed differ from row to
  // row.
  struct Sinks {
    float of[2];
  };
  template <class Work>
  FM_DEVICE static Sinks sinks_of(const Params& p, const Work& w) {
    if (p.sinks == nullptr) return {-infinity(), -infinity()};
    const int row = lane_id() >> 2;
    return {load_float(p.sinks, w.head + head_of(p, row), p.sinks_dtype),
            load_float(p.sinks, w.head + head_of(p, row + 8), p.sinks_dtype)};
  }
  FM_DEVICE static int head_of(const Params& p, int row) { return row & ((1 << p.pack_bits) - 1); }

  // Where a warp's rows of a tile go, of which `tile_row` is the first.
  struct Output {
    RowsOut<Element> rows;
    float* g_lse;  // null: not wanted
    i64 lse_stride_h;
  };
  template <class Work>
  FM_DEVICE static Output output_of(const Params& p, const Work& w, int tile_row) {
    const int q_row = w.q_row + (tile_row >> p.pack_bits), rows = w.band.rows - w.m0 - tile_row;
    const bool lse = p.lse != nullptr && w.v_block == 0;
    const i64 first =
        w.batch * p.out_stride_b + q_row * p.out_stride_s + w.head * p.out_stride_h + w.v_block * kHeadDimV;
    return {{&p.out_map, static_cast<Element*>(p.out) + first, p.out_stride_s, p.out_stride_h, rows,
             p.head_dim_v - w.v_block * kHeadDimV, w.v_block * kHeadDimV, w.head, q_row,
             Keys::map_batch(p, w.batch), p.pack_bits},
            lse ? p.lse + w.lse_offset + (tile_row >> p.pack_bits) : nullptr,
            p.lse_stride_h};
  }

  // kStaged: through kStagedBytes of the warp's own at s_panels.
  template <bool kStaged>
  FM_DEVICE static void write(const Output& to, u32 s_panels, const float (&r_out)[kHeadDimV / 8][4],
                              const float (&out_scale)[2], const float (&lse)[2]) {
    if constexpr (kStaged) store_accumulator_rows(to.rows, s_panels, r_out, out_scale);
    else store_accumulator_directly(to.rows, r_out, out_scale);
    if (to.g_lse != nullptr && (lane_id() & 3) == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = i * 8 + (lane_id() >> 2);
        if (row < to.rows.rows) to.g_lse[to.rows.offset(row, 1, to.lse_stride_h)] = lse[i];
      }
    }
  }

  // kClearers warps of each block, this one the number `clearer`. Queries that see no key get 0 and their
  // sink, or -inf; rows that are no sequence's 0 and -inf where that is wanted. Of packed arrays a warp takes
  // whole sequences and the gaps between them, which are short; of others some rows of each batch entry.
  enum { kClearers = 2 };
  FM_DEVICE static void clear_rest(const Params& p, int clearer) {
    const u32 first = blockIdx.x * kClearers + clearer, clearers = gridDim.x * kClearers;
    if (p.lengths == kPackedLengths) {
      for (int i = first; i <= p.batch; i += clearers) {
        fill_rows(p, 0, PackedKeys::gap(p, i), false);
        if (!p.may_unsee || i == p.batch) continue;
        const Sequence found = PackedKeys::sequence(p, i);
        fill_rows(p, 0, {found.q_row, found.q_row + unseeing(p, found)}, true);
      }
      return;
    }
    const int rows = p.lengths == kEvenLengths ? unseeing(p, DenseKeys::each(p)) : p.seqlen_q;
    const int parts = div_up(rows, kFilledRows);
    for (u32 part = first; part < static_cast<u32>(parts) * p.batch; part += clearers) {
      const int batch = part / parts, begin = part % parts * kFilledRows;
      const int end = min(begin + kFilledRows, rows);
      const Sequence found = DenseKeys::sequence(p, batch);
      const int seeing = found.q_row + unseeing(p, found), behind = found.q_row + found.seqlen_q;
#pragma unroll 1
      for (int i = 0; i < 3; ++i) {  // before the first query, queries that see no key, behind the last one
        const int from = i == 0 ? 0 : i == 1 ? found.q_row : behind;
        const int to = i == 0 ? found.q_row : i == 1 ? seeing : rows;
        fill_rows(p, batch, {max(begin, from), min(end, to)}, i == 1);
      }
    }
  }

 private:
  enum { kFilledRows = 16 };  // of a batch entry at a time: enough of them to hide the look at the lengths

  // unseeing: these are queries that see no key. The consumers have most of the issue slots, so 512 bytes
  // should take few instructions: each lane keeps to 16 bytes of the heads and goes down the rows. Unrolled,
  // the loops would want more registers than the warp has.
  FM_DEVICE static void fill_rows(const Params& p, int batch, Rows rows, bool unseeing) {
    if (rows.begin >= rows.end) return;
    const bool out = unseeing || p.clear_rest & kClearOut;
    const bool lse = unseeing ? p.lse != nullptr : p.clear_rest & kClearLse;
    const int chunks = p.head_dim_v / 8;
    for (int i = lane_id(); out && i < p.heads_q * chunks; i += 32) {
      Element* g_chunk = static_cast<Element*>(p.out) + batch * p.out_stride_b + rows.begin * p.out_stride_s +
                         i / chunks * p.out_stride_h + i % chunks * 8;
#pragma unroll 1
      for (int row = rows.begin; row < rows.end; ++row, g_chunk += p.out_stride_s)
        *reinterpret_cast<uint4*>(g_chunk) = make_uint4(0, 0, 0, 0);
    }
#pragma unroll 1
    for (int head = 0; lse && head < p.heads_q; ++head) {
      const bool sink = unseeing && p.sinks != nullptr;
      const float value = sink ? load_float(p.sinks, head, p.sinks_dtype) : -infinity();
      float* g_lse = p.lse + batch * p.lse_stride_b + head * p.lse_stride_h;
#pragma unroll 1
      for (int row = rows.begin + lane_id(); row < rows.end; row += 32) g_lse[row] = value;
    }
  }
};

}  // namespace fm
