// What the host hands to the mixture-of-experts kernels, which plan/params.py reads here. Strides count
// elements. An assignment is one choice of a token: choice k of token t has the flat index t * top_k + k.
#pragma once
#include "math/dtype.cuh"

namespace fm {

enum ScoringFunc : int { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };  // scoring_func

struct MoeRouterParams {
  const void* logits;            // (tokens, experts)
  const void* bias;              // (experts), added for the choice only; null: none
  float* topk_weights;           // (tokens, top_k)
  int* topk_ids;                 // (tokens, top_k)
  float* partial_probabilities;  // (warps, experts): sums over the tokens of a warp; null: no statistics
  int* partial_counts;           // (warps, experts): how often each expert was chosen
  float* partial_z;              // (warps): sums of logsumexp^2
  i64 logits_stride;             // from token to token
  int tokens, experts, top_k, tokens_per_block;
  int logits_dtype, bias_dtype, scoring_func, renormalize;
  int groups, topk_groups;       // experts choose in topk_groups of so many groups; 1: no groups
  float scale;                   // the factor of all weights
  int unused;
};

struct MoeRouterStatsParams {
  const float* partial_probabilities;
  const int* partial_counts;
  const float* partial_z;
  int* expert_counts;          // (experts): assignments that are kept
  int* dropped;                // (experts): assignments that are not
  float* load_balancing_loss;  // one value
  float* z_loss;               // one value
  int tokens, experts, rows, capacity;  // rows: of the partial sums; capacity: assignments an expert may keep
};

struct MoeCapacityParams {
  const int *offsets, *inverse_indices;
  float* topk_weights;
  int* topk_ids;
  int assignments, capacity;
};

struct MoePermuteParams {
  const void* topk_ids;    // (tokens, top_k)
  const int* expert_map;   // (ids): the expert of an id, or a negative number; null: an id is the expert
  int* counts;             // (blocks, experts): a block's assignments, from kernel to kernel; null: one block
  int* offsets;            // (experts + 1)
  int* sorted_indices;     // (assignments)
  int* inverse_indices;    // (assignments)
  u32* counters;           // (2 + experts), of GroupedGemmParams, become 0; null: none
  i64 ids_stride;          // from token to token
  int assignments, top_k, experts, ids;  // ids: from 0 to ids - 1; all others are skipped
  int per_warp, ids_wide;  // assignments of a warp, a multiple of 32; 1: ids have 64 bits, 0: 32
};

struct MoeCombineParams {
  const void* y;               // (assignments in the order of the experts, columns)
  const int* inverse_indices;  // (tokens, top_k): row of y, -1: none; null: found in topk_ids
  // (tokens, top_k), at most 32 in all, which the products have sorted by themselves; null: they have not.
  const void* topk_ids;
  const int* expert_map;       // as in MoePermuteParams, and ids_stride, experts, ids and ids_wide
  const void* topk_weights;    // (tokens, top_k); null: all 1
  const void* shared;          // (tokens, columns), added; null: none
  const void* shared_gate;     // (tokens), its factor; null: 1
  void* out;                   // (tokens, columns)
  i64 weights_stride_t, weights_stride_k, shared_gate_stride, out_stride, ids_stride;
  int tokens, top_k, columns, weights_dtype;
  int gate_dtype, aligned;     // aligned: 1 if rows of out start at multiples of 16 bytes
  int experts, ids, ids_wide, unused;
};

struct GroupedClearParams {
  void* out;               // rows without a gap between them
  const int* offsets;      // (groups + 1): rows of a group; null: group g begins at row g * max_rows,
  const int* group_sizes;  // (groups), and has so many rows
  i64 row_chunks;          // pieces of 16 bytes that a row has
  int groups, rows;        // rows: of out
  int max_rows, unused;
};

// activation; with a gate up to kSwigluOai.
enum Activation : int {
  kIdentity = 0, kSwiglu, kGeglu, kGegluTanh, kSwigluOai, kGelu, kGeluTanh, kRelu, kRelu2
};

// rows_counted: the product counts the rows of out that it has written. A positive number n: the rows of x
// are counted by the product in front, which n tiles along its columns write; this one waits for those of a
// group.
enum RowsCounted : int { kCountsRows = -1, kNoCounts = 0 };
// tile_counter: a cluster takes the next tile when it is free, by the first or the second of `counters`; or
// every so many-th tile is its own.
enum TileCounter : int { kNoCounter = 0, kFirstCounter = 1, kSecondCounter = 2 };

struct GroupedGemmParams {
  const void *x, *w;
  void* out;
  const void* bias;           // (groups, rows of w); null: none
  const int* offsets;  // (groups + 1): rows of a group in out; null: group g begins at g * group_stride,
  const int* group_sizes;     // (groups), and has so many rows; null: max_rows
  const int* gather_indices;  // (rows): row r reads row gather_indices[r] / gather_divisor of x; null: row r
  const void* row_weights;    // a factor for each row before the bias, by its gather index; null: none
  // (tokens, top_k), at most 32 in all (self-sorted): groups and gathered rows are found in them; null: they
  // stand in the arrays above.
  const void* topk_ids;
  const int* expert_map;      // as in MoePermuteParams
  const void* next_w;         // weights of the product behind this one, see next_rows
  u32* counters;  // two TileCounters; then (groups): rows written, once for each tile along the columns
  i64 x_stride, w_stride_e, w_stride_n, w_stride_half, out_stride;
  i64 bias_stride_e, bias_stride_n, bias_stride_half;
  i64 row_weights_stride_t, row_weights_stride_k, ids_stride;
  i64 next_stride_e, next_stride_n;        // of next_w
  int groups, max_rows;                    // max_rows: the most that a group has
  int rows_x, rows;                        // of x and of out
  int k, n, n_blocks, gather_divisor;      // summed dimension; columns of out; tiles along them
  int activation, bias_dtype, row_weights_dtype, aligned;
  float alpha, limit;
  int section;                             // tiles of rows worked on together, so that weights are read once
  int group_stride, x_skip;                // rows from group to group in out; how many more they are in x
  int assignments, top_k, ids, ids_wide;   // of topk_ids, as in MoePermuteParams
  int groups_known_early;  // 1: the grid in front makes x alone, and groups are known before its end
  int prefetch_k;                          // columns of w that go to L2 before groups are known; 0: none
  int share_rows;  // 1: the blocks of a cluster have the same rows and different columns
  int gathers;                             // 1: rows of x are gathered
  int rows_counted;                        // RowsCounted, or how often each row of x is counted
  int tile_counter;                        // TileCounter
  // When a block has asked for all of its w, it asks L2 for weights of tile next_first + its number of the next
  // product: next_rows of next_n rows (0: it does not), next_k columns of each.
  int next_rows, next_n, next_first, next_k;
};

struct GroupedGemmSm90Params : GroupedGemmParams {
  alignas(128) TensorMap x_map;  // (k, rows): boxes of 64 x kBlockM; not used when rows are gathered
  TensorMap w_map;               // (k, halves, n, groups): boxes of 64 x 1 x kBlockN / 2 x 1
  TensorMap out_map;             // (n, 1, rows, 1): boxes of 64 x 16
};

// The same for products whose activation is swiglu within +-limit. It is a type, so that kernels with it are
// compiled by themselves and the code of all others does not hold it.
template <class Params>
struct Clamped : Params {};

}  // namespace fm
