// What the host hands to the mixture-of-experts kernels, which plan/params.py reads here. Strides count elements. An assignment is one
// choice of a token: choice k of token t has the flat index t * top_k + k.
#pragma once
#include "math/dtype.cuh"

namespace fm {

enum ScoringFunc : int { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };

struct MoeRouterParams {
  const void* logits;            // (tokens, experts)
  const void* bias;              // (experts), added for the choice only; null: none
  float* topk_weights;           // (tokens, top_k)
  int* topk_ids;                 // (tokens, top_k)
  float* partial_probabilities;  // (rows, experts): sums of probabilities, a row for each warp; null: no statistics
  int* partial_counts;           // (rows, experts)
  float* partial_z;              // (rows)
  i64 logits_stride;
  int tokens, experts, top_k, tokens_per_block;
  int logits_dtype, bias_dtype, scoring_func, renormalize;
  int groups, topk_groups;
  float scale;
  int unused;
};

struct MoeRouterStatsParams {
  const float* partial_probabilities;
  const int* partial_counts;
  const float* partial_z;
  int* expert_counts;          // (experts), what is kept of each
  int* dropped;                // (experts)
  float* load_balancing_loss;  // one value
  float* z_loss;               // one value
  int tokens, experts, rows, capacity;
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
  int* counts;             // (blocks, experts), between the two kernels; null with one block
  int* offsets;            // (experts + 1)
  int* sorted_indices;     // (assignments)
  int* inverse_indices;    // (assignments)
  u32* counters;           // (2 + experts), become 0; null: none
  i64 ids_stride;          // from token to token
  int assignments, top_k, experts, ids;
  int per_warp, ids_wide;  // assignments of a warp, a multiple of 32; ids are 64-bit
};

struct MoeCombineParams {
  const void* y;               // (assignments in the order of the experts, columns)
  const int* inverse_indices;  // (tokens, top_k): row of y, -1: none
  const void* topk_weights;    // (tokens, top_k); null: all 1
  const void* shared;          // (tokens, columns), added; null: none
  const void* shared_gate;     // (tokens), its factor; null: 1
  void* out;                   // (tokens, columns)
  i64 weights_stride_t, weights_stride_k, shared_gate_stride, out_stride;
  int tokens, top_k, columns, weights_dtype;
  int gate_dtype, aligned;     // aligned: rows of out start at multiples of 16 bytes
};

struct GroupedClearParams {
  void* out;               // rows without a gap between them
  const int* offsets;      // (groups + 1), or null
  const int* group_sizes;  // (groups), where groups lie max_rows apart
  i64 row_chunks;          // of 16 bytes
  int groups, rows;        // rows: of out
  int max_rows, unused;
};

enum Activation : int { kIdentity = 0, kSwiglu, kGeglu, kGegluTanh, kSwigluOai, kGelu, kGeluTanh, kRelu, kRelu2 };

struct GroupedGemmParams {
  const void *x, *w;
  void* out;
  const void* bias;           // (groups, rows of w); null: none
  const int* offsets;         // (groups + 1): rows of a group in out; null: it begins at group_stride times its number
  const int* group_sizes;     // (groups): and has so many rows; null: max_rows
  const int* gather_indices;  // (rows): row r reads row gather_indices[r] / gather_divisor of x; null: row r
  const void* row_weights;    // a factor for each row before the bias, by its gather index; null: none
  const void* topk_ids;       // (tokens, top_k), at most 32 in all: groups and gathered rows are found in them; null: in the arrays above
  const int* expert_map;      // as in MoePermuteParams
  int* inverse_indices;       // the same, written here; null: not wanted
  u32* counters;              // 2 for tiles that blocks have taken, then (groups): rows written, times tiles along the columns
  i64 x_stride, w_stride_e, w_stride_n, w_stride_half, out_stride, bias_stride_e, bias_stride_n, bias_stride_half;
  i64 row_weights_stride_t, row_weights_stride_k, ids_stride;
  int groups, max_rows, rows_x, rows;      // rows: of out
  int k, n, n_blocks, gather_divisor;      // summed dimension; columns of out; tiles along them
  int activation, bias_dtype, row_weights_dtype, aligned;
  float alpha, limit;
  int section;                             // tiles of rows that are worked on together, so that their weights are read once
  int group_stride, x_skip;                // rows from group to group, in out; how many more they are in x
  int assignments, top_k, ids, ids_wide;   // of topk_ids
  int early;                               // the rows of a group are known before the kernel that runs before this one has ended
  int guess;                               // they are not, but probably every group has one tile of rows: so much of w along k goes to L2
  int across;                              // the blocks of a cluster have the same rows and different columns
  int awaited;                             // -1: rows are counted; more: they wait until each row of x was counted so often; 0: neither
  int dealt;                               // 1, 2: blocks take the next tile when they are free, by that counter; 0: every so many-th
};

struct GroupedGemmSm90Params : GroupedGemmParams {
  alignas(128) TensorMap x_map;  // (k, rows): boxes of 64 x kBlockM; not used when rows are gathered
  TensorMap w_map;               // (k, halves, n, groups)
  TensorMap out_map;             // (n, 1, rows, 1): boxes of 64 x 16
};

// The same for products whose activation is swiglu within +-limit. Kernels know it by this type, so that it is compiled apart and the code
// of all others stays as it is.
template <class Params>
struct Clamped : Params {};

}  // namespace fm
