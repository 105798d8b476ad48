// What one instruction set offers. Every body is compiled once per instruction set (isa_*.cpp) and hands its functions
// to the drivers through this table, the only way to code of a wide instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "../common/cpu_features.h"
#include "../common/tensor_view.h"

namespace kf::cpu {

// Rows of x [n, d] as symmetric_rank_k_update packs them: `weight` and `mask` may be null.
struct SymmetricSource {
  const void* x;
  DType dtype;
  int64_t d;
  int64_t row_stride, column_stride;
  const double* weight;  // [n], contiguous
  const uint8_t* mask;   // [n], contiguous: 0 leaves the row out
};

// Rows of x packed by one task.
constexpr int64_t PACK_STEP = 32;

// Rows [i0, i1) and columns [j0, j1) of a matrix.
struct BlockRange {
  int64_t i0, i1, j0, j1;
};

// The matrix [d, d] that symmetric_rank_k_update adds to, with contiguous rows.
struct Accumulator {
  void* data;
  DType dtype;
  int64_t stride;  // from row to row
};

// `depth` packed rows of x: left and right point at the panel of column 0.
struct PackedChunk {
  const void *left, *right;
  int64_t depth;
  bool weighted;
  int64_t d;
};

// symmetric_rank_k_update: operands are packed by panels of mr resp. nr columns of x, `depth` rows at a time.
struct SymmetricKernel {
  int mr, nr;            // tile shape
  int side;              // columns of a macro block: a multiple of mr and of nr
  size_t scratch_bytes;  // working memory of `block`, for each thread
  size_t (*left_panel_bytes)(int64_t depth, bool weighted);
  size_t (*right_panel_bytes)(int64_t depth);
  // Packs rows [k, k + rows) of the chunk of `depth` rows that starts at k0, for all columns; zeros where d ends and
  // in masked rows. k is a multiple of PACK_STEP, and so is rows unless the chunk ends there.
  void (*pack)(const SymmetricSource&, int64_t k0, int64_t depth, int64_t k, int64_t rows, void* left, void* right);
  // Adds alpha times the tiles of a block to the lower triangle of acc. i0 is a multiple of mr, j0 of nr; both ranges
  // are at most `side` long.
  void (*block)(const PackedChunk&, const BlockRange&, double alpha, const Accumulator& acc, void* scratch);
  void (*enter)();  // once per thread before and after `block`; may be null
  void (*leave)();
};

// Factor [rows, k] with any strides, packed into panels of `width` rows: out[k][width], times scale. Where there is an
// order, its entry p is the column that is packed as the p-th.
struct RankKFactor {
  const void* data;
  DType dtype;
  int64_t rows, k;
  int64_t row_stride, k_stride;
  double scale;
  const int64_t* order = nullptr;
};

// What rank_k_update writes: the weight, and its copy in 16 bits where there is one.
struct RankKTarget {
  void* weight;
  DType dtype;
  int64_t row_stride, column_stride;
  void* copy;  // may be null
  DType copy_dtype;
  int64_t copy_row_stride, copy_column_stride;
};

struct RankKKernel {
  int mr, nr;
  size_t element;  // bytes of a packed number
  void (*pack)(const RankKFactor&, int64_t first_row, int width, void* out);
  // weight[i0:i1, j0:j1] += left right^T, rounded once; left points at the panel of row i0, right at that of column j0.
  void (*block)(const void* left, const void* right, int64_t k, const BlockRange&, const RankKTarget&);
};

// A matrix of a masked step; data is null where there is none.
struct StepMatrix {
  void* data;
  DType dtype;
  int64_t row_stride, column_stride;
};

// One step of masked_descent (adam == false) or masked_adam on a weight of the arithmetic's dtype.
struct StepCall {
  StepMatrix weight, mean, square;  // written; the last two by Adam alone
  StepMatrix grad, origin, copy;
  const uint8_t* entries;  // bits of the entries that move; null: all
  int64_t entry_bytes;
  int64_t bit_row, bit_column;  // entry (i, j) is bit i * bit_row + j * bit_column; one of the two is 1
  int64_t k;                    // rows of the factors
  bool adam, active, boxed, decay_all;
  double lr, decay, bound;
  double beta1, beta2, eps, root;  // Adam's; lr and root hold the corrections of its means
};

// Gradients from factors: panels are packed as the block wants them, `depth` numbers for each of their rows.
struct StepProducts {
  int mr, nr;
  size_t element;  // bytes of a packed number
  void (*pack)(const RankKFactor&, int64_t first_row, int width, int64_t depth, void* out);
  bool (*block)(const void* left, const void* right, int64_t depth, const BlockRange&, const StepCall&);
};

// Every function returns whether all it stepped was finite before the box.
struct StepKernel {
  bool (*rows)(const StepCall&, const BlockRange&);
  StepProducts dense, sparse;
};

enum class Activation : int { identity, relu, silu, gelu, gelu_tanh };

// x [rows, d] holds numbers of the arithmetic's dtype, its rows contiguous.
struct DistanceCall {
  const void* x;
  int64_t x_stride, rows, d, h;
  StepMatrix weights;    // of memory 0
  int64_t memory_bytes;  // from one memory to the next
  StepMatrix reference;
  StepMatrix bias;  // one row
  Activation activation;
};

struct RoutedCall {
  const void* x;
  int64_t x_stride, d, h;
  StepMatrix bias;
  void* out;  // [n, h], contiguous
  DType out_dtype;
};

struct RowProductsKernel {
  int64_t outputs;  // of one task
  size_t element;
  void (*widen_row)(const StepMatrix& x, int64_t i, int64_t d, void* out);
  // Outputs from `first` on of one memory: the sum of squared differences for each row of x.
  void (*differences)(const DistanceCall&, int64_t memory, int64_t first, void* partial);
  // Outputs from `first` on of the listed rows.
  void (*routed)(const RoutedCall&, const StepMatrix& matrix, const int64_t* rows, int64_t row_count, int64_t first);
};

// Rows of x [rows, d] into those of out, which is contiguous. `weight` is fp32 or of the dtype of x.
struct RmsNormCall {
  const void* x;
  int64_t row_stride;
  void* out;
  DType dtype;
  const void* weight;
  DType weight_dtype;
  int64_t d;
  double eps;
  bool round_first;  // to the dtype of x, before the product with the weight
  float* rstd;       // [rows], written; may be null
};

// Its gradient in x: rows of grad and x [rows, d] into those of out, which is contiguous.
struct RmsNormBackwardCall {
  const void* grad;
  int64_t grad_stride;
  const void* x;
  int64_t x_stride;
  void* out;
  DType dtype;
  const void* weight;
  DType weight_dtype;
  const float* rstd;
  int64_t d;
};

enum class Gate : int { silu, gelu_tanh };

// Rows of gate(x) * up, both [rows, d], into those of out, which is contiguous.
struct GatedCall {
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* out;
  DType dtype;
  int64_t d;
  Gate activation;
};

// Its gradients in both: rows of grad, gate and up [rows, d] into those of d_gate and d_up, which are contiguous.
struct GatedBackwardCall {
  const void* grad;
  int64_t grad_stride;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* d_gate;
  void* d_up;
  DType dtype;
  int64_t d;
  Gate activation;
};

// Rows of bytes: masks [rows, bytes] and a book of the same width.
struct OverlapCall {
  const uint8_t* masks;
  int64_t mask_stride, rows;
  const uint8_t* book;
  int64_t book_stride;
  int64_t bytes;
};

// The size of an entry: |x|, |x / (y + 1e-8)| or |x - y|. x and y are contiguous, both of float64 or none.
enum class SizeKind { plain, quotient, difference };
struct SizeSource {
  const void* x;
  DType x_dtype;
  const void* y;
  DType y_dtype;
  int64_t n;
  SizeKind kind;
};

// The digit of `width` bits from bit `shift` on, of all sizes or of those whose higher bits are `prefix`.
struct DigitPass {
  int shift, width;
  uint64_t prefix;
  bool all;
};

// ties_merge: of each memory the differences from base whose bits are at least `bound` stay, those equal to it up to
// entry `last_equal` alone. Everything is contiguous; base, memories and out are all of float64, or none.
constexpr int MOST_MEMORIES = 16;
struct MergeCall {
  struct Memory {
    const void* data;
    double coefficient;
    uint64_t bound;
    int64_t last_equal;
  };
  const void* base;
  DType base_dtype;
  DType memory_dtype;
  void* out;
  DType out_dtype;
  int memories;
  Memory of[MOST_MEMORIES];
};

// Some columns of queries and keys: sums [query_count, key_count] += sums of squared differences, but for pairs whose
// sum exceeds the limit of their query, which need not be exact any more.
constexpr int64_t NEAREST_DEPTH = 512;  // columns at most
template <class T>
struct NearestBlock {
  const T* queries;
  int64_t query_stride, query_count;
  const T* keys;
  int64_t key_stride, key_count;
  int64_t depth;
  T* sums;
  int64_t sum_stride;
  const T* limits;  // [query_count]
};

// target_log_probs, or with `pair` distribution_kl, for the rows of one group. Rows of states are lanes, packed by
// HeadKernel::pack; with `pair` those of the reference are the second half of the lanes.
struct HeadCall {
  StepMatrix head;  // [V, d]
  StepMatrix bias;  // one row; data is null where there is none
  const void* states;
  int64_t d, rows, lanes;
  const int64_t* targets;  // [lanes], -1 in those without a row; null with `pair`
  double softcap;          // 0: none
  bool gradient, pair, reverse;
};

// What a part of the vocabulary contributes. Nothing needs to be set before.
struct HeadPart {
  void* numbers;  // five arrays of as many numbers as there are lanes
  int64_t* best;  // [lanes]
  void* slopes;   // [lanes, d filled up to vectors]; null without a gradient
};

// Where results of a group's rows go, the first of them to `row`.
struct HeadResult {
  int64_t row;
  void *value, *top;
  int64_t* best;
  void* slope;  // [rows, d]
};

struct HeadKernel {
  int64_t lane;    // the lanes of a call are a multiple of it, each half of a pair's too
  int64_t block;   // a part is best a multiple of it
  int64_t vector;  // columns of slopes are filled up to a multiple of it
  size_t element;  // bytes of a number
  size_t (*scratch_bytes)(int64_t lanes);
  void (*pack)(const StepMatrix& states, int64_t rows, int64_t d, int64_t first_lane, int64_t lanes, void* packed);
  void (*run)(const HeadCall&, int64_t begin, int64_t end, const HeadPart&, void* scratch);  // tokens [begin, end)
  // The results of one row of the group, from all parts of the vocabulary.
  void (*finish)(const HeadCall&, const HeadPart* parts, int64_t count, int64_t row, const HeadResult&);
};

// Tokens [N, heads, size], a head's numbers contiguous; strides in numbers.
struct HeadRows {
  void* data;
  int64_t token_stride, head_stride;
};

// Fixed keys or values [rows, groups, places, size], a place's numbers contiguous.
struct PrefixRows {
  const void* data;  // null: there are none
  int64_t row_stride, group_stride, place_stride;
};

// Attention of packed tail tokens over fixed prefixes; all numbers of one dtype, but the normalizer.
struct TailAttentionCall {
  DType dtype;
  bool backward;
  int64_t heads, groups, size;
  const int64_t* starts;  // [rows + 1]
  HeadRows query, key, value;
  PrefixRows prefix_keys, prefix_values;
  const int64_t* spans;        // [rows, 2] places of each prefix; null where there are none
  const int64_t* prefix_rows;  // [rows]; null: row r has prefix r
  float scale, softcap;
  int64_t window;     // 0: none
  float* normalizer;  // [N, heads, 2]: largest score, and 1 / the sum of exponentials; written by the forward pass
  HeadRows out;
  HeadRows grad, of_query, of_key, of_value;
};

struct TailAttentionScratch {
  int64_t longest_tail, longest_keys;  // of any row
  void* memory;
};

struct TailAttentionKernel {
  size_t (*scratch_bytes)(const TailAttentionCall&, int64_t longest_tail, int64_t longest_keys);  // of a thread
  void (*run)(const TailAttentionCall&, int64_t row, int64_t group, const TailAttentionScratch&);
};

struct KernelTable {
  SymmetricKernel symmetric_f32;   // x fp32, bf16, fp16: arithmetic in fp32
  SymmetricKernel symmetric_f64;   // x fp64
  SymmetricKernel symmetric_bf16;  // x bf16 on matrix units; mr == 0 where there are none
  RankKKernel rank_k_f32, rank_k_f64;
  StepKernel step_f32, step_f64;
  RowProductsKernel row_products_f32, row_products_f64;
  void (*rms_norm)(const RmsNormCall&, int64_t first, int64_t last);  // rows [first, last)
  void (*rms_norm_backward)(const RmsNormBackwardCall&, int64_t first, int64_t last);
  void (*gated)(const GatedCall&, int64_t first, int64_t last);
  void (*gated_backward)(const GatedBackwardCall&, int64_t first, int64_t last);
  // Rows [first, last) of the book: count [rows] and index [rows] are replaced where one of them is better.
  void (*best_overlap)(const OverlapCall&, int64_t first, int64_t last, int64_t* count, int64_t* index);
  // Entries [first, last), fewer than 2^31, into histogram [2^width]; where all are counted, `largest` rises to the
  // largest size's bits.
  void (*count_digits)(const SizeSource&, int64_t first, int64_t last, const DigitPass&, int64_t* histogram,
                       uint64_t* largest);
  // The nth (from 1) of entries [first, last) whose bits are `key`, or -1 with nth reduced by how many there are.
  int64_t (*find_equal)(const SizeSource&, int64_t first, int64_t last, uint64_t key, int64_t* nth);
  void (*ties_merge)(const MergeCall&, int64_t first, int64_t last);
  void (*add_squares_f32)(const NearestBlock<float>&);
  void (*add_squares_f64)(const NearestBlock<double>&);
  void (*widen_row)(const void* data, DType dtype, int64_t count, float* out);  // bfloat16 or float16
  HeadKernel head_f32, head_f64;
  TailAttentionKernel tail_attention;
};

// setup.py defines KF_ISA_* for those whose flags the compiler knows.
const KernelTable& generic_table();
const KernelTable& avx2_table();
const KernelTable& avx512_table();
const KernelTable& amx_table();
const KernelTable& neon_table();

// The table in use: the widest allowed one unless select_isa() chose another.
const KernelTable& active_table();
Isa active_isa();
// Empty when `isa` is in this build and may be used here, otherwise why not.
std::string refusal(Isa isa);
// Throws InvalidArgument when `isa` cannot be used here.
void select_isa(Isa isa);

}  // namespace kf::cpu
