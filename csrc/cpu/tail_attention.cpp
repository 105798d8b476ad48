#include "tail_attention.h"

#include <algorithm>
#include <string>

#include "../common/aligned_buffer.h"
#include "../common/error.h"
#include "../common/parallel.h"
#include "by_rows.h"
#include "kernel_table.h"
#include "written_matrix.h"

namespace kf::cpu {
namespace {

constexpr double GRAIN = 200000;  // products that a thread is worth

struct Extent {
  int64_t rows, longest_tail = 0, longest_keys = 0;
  double products = 0;
};

void check_tokens(const TensorView& t, const std::string& name, const TensorView& query, int64_t heads) {
  require(t.ndim == 3 && t.dtype == query.dtype, name + " must have three dimensions and the dtype of query");
  require(t.shape[0] == query.shape[0] && t.shape[1] == heads && t.shape[2] == query.shape[2],
          name + " must be [N, heads, size], its sizes those of the other tensors");
  require(t.shape[2] <= 1 || t.stride[2] == 1, "numbers of a head must be contiguous in " + name);
}

const int64_t* check_integers(const TensorView& t, const std::string& name, int64_t rows, int64_t columns) {
  const bool flat = columns == 1;
  require(t.dtype == DType::i64 && t.ndim == (flat ? 1 : 2) && t.shape[0] == rows && (flat || t.shape[1] == columns),
          name + " must be int64 with one entry, or two for spans, for each row");
  require((flat || t.stride[1] == 1) && (rows <= 1 || t.stride[0] == columns), name + " must be contiguous");
  return static_cast<const int64_t*>(t.data);
}

void check_prefixes(const TensorView& t, const std::string& name, const TensorView& key, const TensorView& other) {
  require(t.ndim == 4 && t.dtype == key.dtype && t.shape[1] == key.shape[1] && t.shape[3] == key.shape[2],
          name + " must be [rows, groups, places, size] in the dtype of key");
  require(t.shape[0] == other.shape[0] && t.shape[2] == other.shape[2],
          "prefix_keys and prefix_values must be of one shape");
  require(t.shape[3] <= 1 || t.stride[3] == 1, "numbers of a place must be contiguous in " + name);
}

HeadRows head_rows(const TensorView& t) { return {t.data, t.stride[0], t.stride[1]}; }
PrefixRows prefix_rows(const TensorView& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2]}; }

// Checks what both passes read, and fills in that part of the call.
Extent read_inputs(const TailAttentionInputs& in, TailAttentionCall& call) {
  const TensorView &query = in.query, &key = in.key;
  require(query.ndim == 3, "query must be [N, heads, size]");
  check_floats(query, "query");
  require(query.dtype != DType::f64, "query must be float32, bfloat16 or float16");
  const int64_t tokens = query.shape[0], heads = query.shape[1];
  require(key.ndim == 3 && key.shape[1] > 0 && heads % key.shape[1] == 0,
          "key must be [N, groups, size] with groups that divide the heads");
  require(heads > 0 && query.shape[2] > 0, "query must have heads and numbers");
  check_tokens(query, "query", query, heads);
  check_tokens(key, "key", query, key.shape[1]);
  check_tokens(in.value, "value", query, key.shape[1]);
  require(in.starts.ndim == 1 && in.starts.shape[0] >= 1, "starts must be [R + 1]");
  Extent extent{in.starts.shape[0] - 1};
  call.dtype = query.dtype;
  call.heads = heads;
  call.groups = key.shape[1];
  call.size = query.shape[2];
  call.starts = check_integers(in.starts, "starts", extent.rows + 1, 1);
  call.query = head_rows(query);
  call.key = head_rows(key);
  call.value = head_rows(in.value);
  call.scale = float(in.scale);
  call.softcap = float(in.softcap);
  call.window = in.window;
  require(in.window >= 0 && in.softcap >= 0, "window and softcap must not be negative");
  const bool prefixed = in.spans.defined();
  require(prefixed == in.prefix_keys.defined() && prefixed == in.prefix_values.defined(),
          "prefix_keys, prefix_values and spans come together");
  require(prefixed || !in.prefix_rows.defined(), "prefix_rows needs prefix_keys");
  int64_t stored = extent.rows, places = 0;
  if (prefixed) {
    check_prefixes(in.prefix_keys, "prefix_keys", key, in.prefix_keys);
    check_prefixes(in.prefix_values, "prefix_values", key, in.prefix_keys);
    call.prefix_keys = prefix_rows(in.prefix_keys);
    call.prefix_values = prefix_rows(in.prefix_values);
    call.spans = check_integers(in.spans, "spans", extent.rows, 2);
    stored = in.prefix_keys.shape[0];
    places = in.prefix_keys.shape[2];
    if (in.prefix_rows.defined()) call.prefix_rows = check_integers(in.prefix_rows, "prefix_rows", extent.rows, 1);
    else require(stored == extent.rows, "prefix_keys must have a row for each row where there are no prefix_rows");
  }
  require(call.starts[0] == 0 && call.starts[extent.rows] == tokens, "starts must rise from 0 to N");
  for (int64_t r = 0; r < extent.rows; ++r) {
    const int64_t tail = call.starts[r + 1] - call.starts[r];
    require(tail >= 0 && tail <= tokens, "starts must rise from 0 to N");
    int64_t prefix = 0;
    if (prefixed) {
      const int64_t begin = call.spans[2 * r], end = call.spans[2 * r + 1];
      require(0 <= begin && begin <= end && end <= places, "spans must be begin and end of places in the prefixes");
      prefix = end - begin;
    }
    if (call.prefix_rows) {
      require(call.prefix_rows[r] >= 0 && call.prefix_rows[r] < stored, "prefix_rows must be rows of prefix_keys");
    }
    extent.longest_tail = std::max(extent.longest_tail, tail);
    extent.longest_keys = std::max(extent.longest_keys, prefix + tail);
    extent.products += double(tail) * double(heads) * (double(prefix) + double(tail) / 2) * double(call.size);
  }
  return extent;
}

void run(const TailAttentionCall& call, const Extent& extent, int threads) {
  if (extent.longest_tail == 0) return;
  const TailAttentionKernel& kernel = active_table().tail_attention;
  const int64_t tasks = extent.rows * call.groups;
  const int limit = int(std::min<int64_t>(threads, tasks));
  const int members = worthwhile_threads(extent.products * (call.backward ? 5 : 2), GRAIN, limit);
  const size_t bytes = kernel.scratch_bytes(call, extent.longest_tail, extent.longest_keys);
  const AlignedBuffer memory(bytes * size_t(members));
  Counter next;
  run_team(members, [&](int member, Team&) {
    const TailAttentionScratch scratch = {extent.longest_tail, extent.longest_keys,
                                          memory.get<char>() + bytes * size_t(member)};
    for (int64_t t; (t = next.take()) < tasks;) kernel.run(call, t / call.groups, t % call.groups, scratch);
  });
}

float* check_normalizer(const TensorView& t, const TailAttentionCall& call, int64_t tokens) {
  require(t.ndim == 3 && t.dtype == DType::f32 && t.shape[0] == tokens && t.shape[1] == call.heads && t.shape[2] == 2,
          "normalizer must be [N, heads, 2] of float32");
  require(t.stride[2] == 1 && (call.heads <= 1 || t.stride[1] == 2) && (tokens <= 1 || t.stride[0] == 2 * call.heads),
          "normalizer must be contiguous");
  return static_cast<float*>(t.data);
}

}  // namespace

void tail_attention(const TensorView& out, const TensorView& normalizer, const TailAttentionInputs& inputs,
                    int threads) {
  TailAttentionCall call = {};
  const Extent extent = read_inputs(inputs, call);
  check_tokens(out, "out", inputs.query, call.heads);
  check_written(out, "out");
  call.normalizer = check_normalizer(normalizer, call, out.shape[0]);
  call.out = head_rows(out);
  run(call, extent, threads);
}

void tail_attention_backward(const TensorView& of_query, const TensorView& of_key, const TensorView& of_value,
                             const TensorView& grad, const TensorView& normalizer, const TailAttentionInputs& inputs,
                             int threads) {
  TailAttentionCall call = {};
  call.backward = true;
  const Extent extent = read_inputs(inputs, call);
  check_tokens(grad, "grad", inputs.query, call.heads);
  check_tokens(of_query, "of_query", inputs.query, call.heads);
  check_tokens(of_key, "of_key", inputs.query, call.groups);
  check_tokens(of_value, "of_value", inputs.query, call.groups);
  check_written(of_query, "of_query");
  check_written(of_key, "of_key");
  check_written(of_value, "of_value");
  call.normalizer = check_normalizer(normalizer, call, grad.shape[0]);
  call.grad = head_rows(grad);
  call.of_query = head_rows(of_query);
  call.of_key = head_rows(of_key);
  call.of_value = head_rows(of_value);
  run(call, extent, threads);
}

}  // namespace kf::cpu
