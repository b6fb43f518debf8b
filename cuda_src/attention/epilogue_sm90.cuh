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

  // One warp of each block. Queries that see no key get 0 and their sink, or -inf; rows that are no
  // sequence's 0 and -inf where that is wanted. Of packed arrays a block takes whole sequences and the gaps
  // between them, which are short; of others some rows of each batch entry.
  FM_DEVICE static void clear_rest(const Params& p) {
    const bool out = p.clear_rest & kClearOut, lse = p.clear_rest & kClearLse;
    if (p.lengths == kPackedLengths) {
      for (int i = blockIdx.x; i <= p.batch; i += gridDim.x) {
        if (out || lse) fill_rows(p, 0, PackedKeys::gap(p, i), out, lse, nullptr);
        if (p.may_unsee && i < p.batch) {
          const Sequence found = PackedKeys::sequence(p, i);
          fill_unseeing(p, 0, {found.q_row, found.q_row + unseeing(p, found)});
        }
      }
      return;
    }
    const int rows = p.lengths == kEvenLengths ? unseeing(p, DenseKeys::each(p)) : p.seqlen_q;
    const int parts = div_up(rows, kFilledRows);
    for (u32 part = blockIdx.x; part < static_cast<u32>(parts) * p.batch; part += gridDim.x) {
      const int batch = part / parts, begin = part % parts * kFilledRows;
      const int end = min(begin + kFilledRows, rows);
      const Sequence found = DenseKeys::sequence(p, batch);
      const int seeing = found.q_row + unseeing(p, found);
      if (out || lse) {
        fill_rows(p, batch, {begin, min(end, found.q_row)}, out, lse, nullptr);
        fill_rows(p, batch, {max(begin, found.q_row + found.seqlen_q), end}, out, lse, nullptr);
      }
      fill_unseeing(p, batch, {max(begin, found.q_row), min(end, seeing)});
    }
  }

 private:
  enum { kFilledRows = 16 };  // enough of them to hide the look at the lengths

  FM_DEVICE static void fill_unseeing(const Params& p, int batch, Rows rows) {
    fill_rows(p, batch, rows, true, p.lse != nullptr, p.sinks);
  }
  FM_DEVICE static void fill_rows(const Params& p, int batch, Rows rows, bool out, bool lse,
                                  const void* sinks) {
    for (int row = rows.begin; row < rows.end; ++row)
      for (int head = 0; head < p.heads_q; ++head) {
        uint4* g_row = reinterpret_cast<uint4*>(static_cast<Element*>(p.out) + batch * p.out_stride_b +
                                                row * p.out_stride_s + head * p.out_stride_h);
        if (out)
          for (int chunk = lane_id(); chunk < p.head_dim_v / 8; chunk += 32)
            g_row[chunk] = make_uint4(0, 0, 0, 0);
        if (lse && lane_id() == 0)
          p.lse[batch * p.lse_stride_b + head * p.lse_stride_h + row] =
              sinks == nullptr ? -infinity() : load_float(sinks, head, p.sinks_dtype);
      }
  }
};

}  // namespace fm
