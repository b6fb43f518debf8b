// Where the queries and keys of a sequence lie in their arrays. An attention kernel has one type Keys. It
// asks that type, and looks neither at cu_seqlens nor at the coordinates of a tensor map itself:
//
//   even(p)              every sequence is like each(p): then a tile's number says where it lies, and no row
//                        follows the last key
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

// The first queries of a sequence that see no key, since causal is aligned at the ends: the Hopper kernel has
// no tiles for them.
FM_DEVICE int unseeing(const AttentionFwdParams& p, const Sequence& s) {
  return p.window_right < 0 ? 0 : min(max(s.seqlen_q - s.seqlen_k - p.window_right, 0), s.seqlen_q);
}
FM_DEVICE Sequence without_unseeing(const AttentionFwdParams& p, const Sequence& s) {
  const int first = unseeing(p, s);
  return {s.q_row + first, s.k_row, s.seqlen_q - first, s.seqlen_k};
}

// The sequence with its keys counted from a row on that is a multiple of kStep, a power of two: fewer than
// kStep rows that are no keys come before the first key.
template <int kStep>
FM_DEVICE Sequence from_step(const Sequence& s) {
  const int before = s.k_row & (kStep - 1);
  return {s.q_row, s.k_row - before, s.seqlen_q, s.seqlen_k + before};
}

// Rows begin .. end - 1.
struct Rows {
  int begin, end;
  FM_DEVICE int count() const { return end - begin; }
};

// One sequence after the other along a batch dimension, each with seqlen_q and seqlen_k rows, of which some
// may be padding: rows leftpad .. seqused - 1 count.
struct DenseKeys {
  FM_DEVICE static Sequence each(const AttentionFwdParams& p) { return {0, 0, p.seqlen_q, p.seqlen_k}; }
  FM_DEVICE static Sequence sequence(const AttentionFwdParams& p, int batch) {
    const Rows q = queries(p, batch), k = keys(p, batch);
    return {q.begin, k.begin, q.count(), k.count()};
  }
  FM_DEVICE static Rows queries(const AttentionFwdParams& p, int batch) {
    return counted(p.leftpad_q, p.seqused_q, batch, p.seqlen_q);
  }
  FM_DEVICE static Rows keys(const AttentionFwdParams& p, int batch) {
    return counted(p.leftpad_k, p.seqused_k, batch, p.seqlen_k);
  }
  FM_DEVICE static int map_batch(int batch) { return batch; }

 private:
  // Whatever the numbers are, the rows lie in the array.
  FM_DEVICE static Rows counted(const int* leftpad, const int* seqused, int batch, int seqlen) {
    const int begin = leftpad == nullptr ? 0 : min(max(leftpad[batch], 0), seqlen);
    return {begin, seqused == nullptr ? seqlen : max(min(seqused[batch], seqlen), begin)};
  }
};

// All sequences in one array of tokens: rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1 are those of sequence b,
// the first seqused[b] count.
struct PackedKeys {
  FM_DEVICE static Sequence sequence(const AttentionFwdParams& p, int batch) {
    const int q_row = p.cu_seqlens_q[batch], k_row = p.cu_seqlens_k[batch];
    int seqlen_q = p.cu_seqlens_q[batch + 1] - q_row, seqlen_k = p.cu_seqlens_k[batch + 1] - k_row;
    if (p.seqused_q != nullptr) seqlen_q = min(seqlen_q, p.seqused_q[batch]);
    if (p.seqused_k != nullptr) seqlen_k = min(seqlen_k, p.seqused_k[batch]);
    return {q_row, k_row, max(seqlen_q, 0), max(seqlen_k, 0)};
  }
  FM_DEVICE static int map_batch(int) { return 0; }

  // The rows of q and out that are no sequence's: gap 0 lies before the first sequence, gap b behind what
  // counts of sequence b - 1.
  FM_DEVICE static Rows gap(const AttentionFwdSm90Params& p, int gap) {
    int begin = 0;
    if (gap > 0) {
      const int first = p.cu_seqlens_q[gap - 1], rows = p.cu_seqlens_q[gap] - first;
      begin = first + (p.seqused_q == nullptr ? rows : max(min(rows, p.seqused_q[gap - 1]), 0));
    }
    return {begin, gap < p.batch ? p.cu_seqlens_q[gap] : p.total_q};
  }
};

// Either of them, as the call has it: one compiled kernel serves both.
struct RowKeys {
  FM_DEVICE static bool even(const AttentionFwdParams& p) { return p.lengths == kEvenLengths; }
  FM_DEVICE static bool packed(const AttentionFwdParams& p) { return p.lengths == kPackedLengths; }
  FM_DEVICE static Sequence each(const AttentionFwdParams& p) { return DenseKeys::each(p); }
  FM_DEVICE static Sequence sequence(const AttentionFwdParams& p, int batch) {
    return packed(p) ? PackedKeys::sequence(p, batch) : DenseKeys::sequence(p, batch);
  }
  // For kernels that ask for one sequence and not for all in turn: q_row is that of its query m0.
  FM_DEVICE static SequenceOf<i64> sequence_from(const AttentionFwdParams& p, int batch, int m0) {
    const Sequence found = even(p) ? each(p) : sequence(p, batch);
    return {static_cast<i64>(found.q_row) + m0, found.k_row, found.seqlen_q, found.seqlen_k};
  }
  FM_DEVICE static int map_batch(const AttentionFwdParams& p, int batch) {
    return packed(p) ? PackedKeys::map_batch(batch) : DenseKeys::map_batch(batch);
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
