// A boolean mask made ready for the Hopper kernel, in one pass over it:
//
//   words   4 of 32 bits for each row and tile of keys: what the 4 threads that hold the row's scores need.
//           Word t, bit n: key 8 n + 2 t of the tile; bit 16 + n: key 8 n + 2 t + 1. 1: attend.
//   lists   for each tile of queries, the tiles of keys that the mask and the band leave, rising, each with
//           bits that say for which consumers it hides none (key_tiles.cuh). A tile of queries that sees no
//           key has one entry, whose scores are all masked.
//
// The mask is p.bias as bytes, of which 0 hides: (batch, heads, seqlen_q, seqlen_k) with any strides, 0 along
// axes that it is spread over. Rows and tiles are counted from the first query and key that count.
//
// One block makes the list of one tile of queries, and the words of its rows; a thread makes those of a row
// and a tile of keys. Where rows are the same for several blocks, all write the same words. Params are those
// of the kernel that reads them.
#pragma once
#include "attention/key_tiles.cuh"
#include "attention/keys.cuh"
#include "tile/mask.cuh"

namespace fm {

template <int kBlockM_, int kBlockN_>
struct AttentionMaskWords {
  using Params = AttentionFwdSm90Params;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kConsumers = kBlockM / 64;
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kQuads = kBlockN / 4;  // of 4 bytes that a row has in a tile
  static_assert(kBlockN == 64 || kBlockN == 128, "a word has bits for 16 blocks of 8 keys");

  // Of a tile of keys: it shows a score; kHidden << i: it hides one from consumer i.
  enum Found : u32 { kAny = 1, kHidden = 2 };
  struct Smem {
    enum { kBytes = 256 };
    u32 found[32];  // of each tile of a round
    int entries;    // of the list so far
  };
  static_assert(sizeof(Smem) <= Smem::kBytes);

  FM_DEVICE static void run(const Params& p) {
    extern __shared__ __align__(16) u8 smem[];
    Smem& s = *reinterpret_cast<Smem*>(smem);
    const int index = static_cast<int>(blockIdx.x), m_block = index % p.m_blocks, list = index / p.m_blocks;
    const int batch = list / p.mask_lists, head = list % p.mask_lists << p.pack_bits;

    const Sequence found = without_unseeing(p, DenseKeys::sequence(p, batch));
    const BandMask band = {found.seqlen_q << p.pack_bits, found.seqlen_k, found.seqlen_k - found.seqlen_q,
                           p.window_left,                 p.window_right, p.pack_bits};
    const int m0 = m_block * kBlockM;
    if (m0 >= band.rows) return;
    const int end = max(1, div_up(band.last(min(m0 + kBlockM, band.rows) - 1) + 1, kBlockN));
    const int begin = min(band.first(m0) / kBlockN, end - 1);
    int* g_list = p.mask_tiles + list_of_tiles(p, batch, head, m_block);
    const u8* g_mask = static_cast<const u8*>(p.bias) + batch * p.bias_stride_b + head * p.bias_stride_h +
                       found.q_row * p.bias_stride_q + found.k_row * p.bias_stride_k;
    u32* g_words = p.mask_words + batch * p.mask_stride_b + head * p.mask_stride_h;

    if (threadIdx.x == 0) s.entries = 0;
    for (int first = begin; first < end; first += 32) {
      const int tiles = min(32, end - first);
      if (threadIdx.x < 32) s.found[threadIdx.x] = 0;
      __syncthreads();
      if (p.bias_stride_q == 0) {  // all rows are one
        if (threadIdx.x < tiles)
          s.found[threadIdx.x] = read_row(p, g_mask, g_words, band, m0, 0, first + threadIdx.x);
      } else {
        // 32 rows of a tile for each warp in turn.
        const int groups = div_up(min(kBlockM, band.rows - m0) >> p.pack_bits, 32);
        for (int i = warp_id(); i < tiles * groups; i += kWarps) {
          const int row = i % groups * 32 + lane_id();
          const u32 mine = read_row(p, g_mask, g_words, band, m0, row, first + i / groups);
          const u32 bits = __reduce_or_sync(0xffffffffu, mine);
          if (lane_id() == 0 && bits != 0) atomicOr(&s.found[i / groups], bits);
        }
      }
      __syncthreads();
      if (warp_id() == 0) add_entries(s, g_list + 1, first, tiles);
      __syncthreads();
    }
    if (threadIdx.x != 0) return;
    if (s.entries == 0) g_list[1] = begin;
    g_list[0] = max(s.entries, 1);
  }

  // By one thread: the words of a row and tile n of keys, and bits of Found.
  FM_DEVICE static u32 read_row(const Params& p, const u8* g_mask, u32* g_words, const BandMask& band, int m0,
                                int row, int n) {
    if (row >= min(kBlockM, band.rows - m0) >> p.pack_bits) return 0;
    const int query = (m0 >> p.pack_bits) + row, col = n * kBlockN;
    const u8* g_row = g_mask + query * p.bias_stride_q + col * p.bias_stride_k;
    Words words;
    if (p.bias_stride_k == 1 && col + kBlockN <= band.cols && reinterpret_cast<u64>(g_row) % 16 == 0) {
      uint4 read[kQuads / 4];
#pragma unroll
      for (int i = 0; i < kQuads / 4; ++i) read[i] = __ldg(reinterpret_cast<const uint4*>(g_row) + i);
#pragma unroll
      for (int i = 0; i < kQuads / 4; ++i)
        words.add(4 * i, read[i].x), words.add(4 * i + 1, read[i].y), words.add(4 * i + 2, read[i].z),
            words.add(4 * i + 3, read[i].w);
    } else {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        u32 quad = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (col + 4 * i + j < band.cols) quad |= g_row[(4 * i + j) * p.bias_stride_k] << 8 * j;
        words.add(i, quad);
      }
    }
    const uint4 made = words.all();
    *reinterpret_cast<uint4*>(g_words + query * p.mask_stride_q + n * 4) = made;
    constexpr u32 kEvery = kBlockN == 128 ? ~0u : 0x00ff00ffu;
    const bool any = (made.x | made.y | made.z | made.w) != 0;
    const bool all = (made.x & made.y & made.z & made.w) == kEvery;
    const u32 consumers = p.bias_stride_q == 0 ? (1u << kConsumers) - 1 : 1u << ((row << p.pack_bits) / 64);
    return (any ? kAny : 0) | (all ? 0 : kHidden * consumers);
  }

  // Bits on their way to words. Quad i, keys 4 i to 4 i + 3, has pairs of two words: of 0 and 1 if i is even,
  // else of 2 and 3. bytes[i % 2][i / 16]: bit i / 2 % 8 of its four bytes.
  struct Words {
    u32 bytes[2][2] = {};
    FM_DEVICE void add(int i, u32 quad) {
      const u32 high = ((quad & 0x7f7f7f7fu) + 0x7f7f7f7fu | quad) & 0x80808080u;  // of bytes that are not 0
      bytes[i % 2][i / 16] |= high >> (7 - i / 2 % 8);
    }
    FM_DEVICE uint4 all() const {
      return {word<0x5140>(0), word<0x7362>(0), word<0x5140>(1), word<0x7362>(1)};
    }
    template <u32 kBytes>
    FM_DEVICE u32 word(int half) const {
      return __byte_perm(bytes[half][0], bytes[half][1], kBytes);
    }
  };

  // By a whole warp: a lane looks at one tile.
  FM_DEVICE static void add_entries(Smem& s, int* g_entries, int first, int tiles) {
    const int lane = lane_id();
    const u32 found = lane < tiles ? s.found[lane] : 0;
    const u32 shown = __ballot_sync(0xffffffffu, (found & kAny) != 0);
    const int before = s.entries + __popc(shown & ((1u << lane) - 1));
    const u32 whole = ~(found / kHidden) & ((1u << kConsumers) - 1);
    if (found & kAny) g_entries[before] = (first + lane) | static_cast<int>(whole << kTileBits);
    __syncwarp();
    if (lane == 0) s.entries += __popc(shown);
    __syncwarp();
  }
};

}  // namespace fm
