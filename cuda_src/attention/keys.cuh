// Where the queries and keys of a sequence lie in their arrays. An attention kernel has one type Keys. It
// asks that type, and looks neither at cu_seqlens nor at the coordinates of a tensor map itself:
//
//   even(p)              every sequence is like each(p): then a tile's number says where it lies
//   sequence(p, batch)   the rows of one sequence, where they differ
//   map_batch(p, batch)  its last coordinate in the tensor maps of q, k, v and out
//   load_queries<Tile>(p, work, s_tile, s_full, row)         one thread lets the copy engine fetch queries,
//   load_keys<Tile>(p, work, map, s_tile, s_full, col, n)    or tile n of the sequence's keys or values
//
// `work` is the tile of queries that is worked on: its batch, head, head_k, q_row (of its first query) and
// k_row (of the sequence's first key). The caller has told the barrier s_full of Tile::kBytes bytes.
//
// RowKeys answers for all arrays that there are today. Keys in pages of a block table are another type, whose
// load_keys fetches a box for each page that tile n touches. Where values are the first columns of the keys
// (latent attention), load_keys fetches nothing for V, and the two rings of the kernel share their buffers.
#pragma once
#include "attention/params.cuh"
#include "ptx/tma.cuh"

namespace fm {

// Where the first query and the first key of a sequence lie, in rows of the arrays, and how many of each
// there are. Row: i64 where rows become addresses, int where they become coordinates.
template <class Row>
struct SequenceOf {
  Row q_row, k_row;
  int seqlen_q, seqlen_k;
};
using Sequence = SequenceOf<int>;

// The questions of the contract above that both kernels ask.
template <class K>
concept AttentionKeys = requires(const AttentionFwdSm90Params& p, int batch) {
  K::even(p) && K::each(p).seqlen_q && K::sequence(p, batch).seqlen_k && K::map_batch(p, batch);
};

// One sequence after the other along a batch dimension, all of the same lengths.
struct DenseKeys {
  FM_DEVICE static Sequence each(const AttentionFwdParams& p) { return {0, 0, p.seqlen_q, p.seqlen_k}; }
  FM_DEVICE static int map_batch(int batch) { return batch; }
};

// All sequences in one array of tokens: rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1 are those of sequence b,
// the first seqused[b] count.
struct PackedKeys {
  FM_DEVICE static Sequence sequence(const AttentionFwdParams& p, int batch) {
    Sequence found = rows(p, batch);
    shorten(p, batch, found);
    return found;
  }
  FM_DEVICE static Sequence rows(const AttentionFwdParams& p, int batch) {
    const int q_row = p.cu_seqlens_q[batch], k_row = p.cu_seqlens_k[batch];
    return {q_row, k_row, p.cu_seqlens_q[batch + 1] - q_row, p.cu_seqlens_k[batch + 1] - k_row};
  }
  template <class Row>
  FM_DEVICE static void shorten(const AttentionFwdParams& p, int batch, SequenceOf<Row>& found) {
    if (p.seqused_q != nullptr) found.seqlen_q = min(found.seqlen_q, p.seqused_q[batch]);
    if (p.seqused_k != nullptr) found.seqlen_k = min(found.seqlen_k, p.seqused_k[batch]);
  }
  FM_DEVICE static int map_batch(int) { return 0; }

  // The rows begin .. end - 1 of q and out that are no sequence's: gap 0 lies before the first sequence, gap
  // b behind what counts of sequence b - 1.
  struct Rows {
    int begin, end;
  };
  FM_DEVICE static Rows gap(const AttentionFwdSm90Params& p, int gap) {
    int begin = 0;
    if (gap > 0) {
      const int first = p.cu_seqlens_q[gap - 1], rows = p.cu_seqlens_q[gap] - first;
      begin = first + (p.seqused_q == nullptr ? rows : min(rows, p.seqused_q[gap - 1]));
    }
    return {begin, gap < p.batch ? p.cu_seqlens_q[gap] : p.total_q};
  }
};

// Either of them, as the call has it: one compiled kernel serves both.
struct RowKeys {
  FM_DEVICE static bool even(const AttentionFwdParams& p) { return p.cu_seqlens_q == nullptr; }
  FM_DEVICE static Sequence each(const AttentionFwdParams& p) { return DenseKeys::each(p); }
  FM_DEVICE static Sequence sequence(const AttentionFwdParams& p, int batch) {
    return PackedKeys::sequence(p, batch);
  }
  // For kernels that ask for one sequence and not for all in turn: q_row is that of its query m0.
  FM_DEVICE static SequenceOf<i64> sequence_from(const AttentionFwdParams& p, int batch, int m0) {
    SequenceOf<i64> found = {m0, 0, p.seqlen_q, p.seqlen_k};
    if (!even(p)) {
      const Sequence packed = PackedKeys::rows(p, batch);
      found = {found.q_row + packed.q_row, packed.k_row, packed.seqlen_q, packed.seqlen_k};
    }
    PackedKeys::shorten(p, batch, found);
    return found;
  }
  FM_DEVICE static int map_batch(const AttentionFwdParams& p, int batch) {
    return even(p) ? DenseKeys::map_batch(batch) : PackedKeys::map_batch(batch);
  }

  // row: of the tile of queries, whose rows are those of packed heads.
  template <class Tile, class Work>
  FM_DEVICE static void load_queries(const AttentionFwdSm90Params& p, const Work& w, u32 s_tile, u32 s_full,
                                     int row) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      tma_load_5d(s_tile + panel * Tile::kPanelBytes, p.q_map, s_full, createpolicy_evict_first(), panel * 64,
                  w.head % p.heads_per_key, w.q_row + (row >> p.pack_bits), w.head_k, map_batch(p, w.batch));
  }

  template <class Tile, class Work>
  FM_DEVICE static void load_keys(const AttentionFwdSm90Params& p, const Work& w, const TensorMap& map,
                                  u32 s_tile, u32 s_full, int col, int n) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      tma_load_4d(s_tile + panel * Tile::kPanelBytes, map, s_full, createpolicy_evict_last(),
                  col + panel * 64, w.k_row + n * Tile::kRows, w.head_k, map_batch(p, w.batch));
  }
};

}  // namespace fm
