// rank_k_update, symmetric_rank_k_update, rms_norm, gated_silu, the gradients of both, and tail_attention of every
// instruction set in this build against plain loops in double: sizes around those of vectors and tiles, every layout,
// NaN, canaries. Prints what is wrong; the last line is "N passed, M failed". Ends with 1 where anything failed.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/cpu/gated.h"
#include "../../csrc/cpu/kernel_table.h"
#include "../../csrc/cpu/rank_k_update.h"
#include "../../csrc/cpu/rms_norm.h"
#include "../../csrc/cpu/symmetric_rank_k_update.h"
#include "../../csrc/cpu/tail_attention.h"
#include "operands.h"

using namespace kf::cpu;
using kf::Isa;
using operands::DType;
using operands::Layout;
using operands::Matrix;
using operands::Random;

namespace {

constexpr int64_t SIZES[] = {0, 1, 7, 63, 64, 65, 129};
constexpr DType FLOATS[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
const char* const NAMES[] = {"float32", "float64", "bfloat16", "float16"};
const double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

int passed = 0, failed = 0;

void report(bool fine, const std::string& what, const char* reason) {
  fine ? ++passed : ++failed;
  if (!fine && failed < 20) std::printf("%s %s: %s\n", kf::isa_name(active_isa()), what.c_str(), reason);
}

template <class... Numbers>
std::string call_of(const char* op, DType dtype, Numbers... numbers) {
  std::string text = std::string(op) + " " + NAMES[int(dtype)];
  ((text += " " + std::to_string(numbers)), ...);
  return text;
}

Layout any_layout(Random& random) { return Layout(random.below(int64_t(Layout::count))); }

// Relative Frobenius limits, as in tests/floors.py.
double rank_k_limit(DType dtype) {
  return dtype == DType::f32 ? 1e-6 : dtype == DType::f64 ? 2e-14 : dtype == DType::bf16 ? 4e-3 : 5e-4;
}

// NaN where it is expected and nowhere else, and the rest within `limit` of its norm.
bool close(const std::vector<double>& result, const std::vector<double>& expected, double limit) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    if (std::isnan(result[i]) != std::isnan(expected[i])) return false;
    if (std::isnan(expected[i]) || result[i] == expected[i]) continue;
    error += (result[i] - expected[i]) * (result[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error) <= limit * std::sqrt(norm);
}

// The same for numbers of any size: each within `limit` of itself, `tiny` where it is smaller than that.
bool each_close(const std::vector<double>& result, const std::vector<double>& expected, double limit, double tiny) {
  for (size_t i = 0; i < result.size(); ++i) {
    if (std::isnan(result[i]) != std::isnan(expected[i])) return false;
    if (std::isnan(expected[i]) || result[i] == expected[i]) continue;
    if (!(std::fabs(result[i] - expected[i]) <= limit * std::fabs(expected[i]) + tiny)) return false;
  }
  return true;
}

void check_rank_k(Random& random, DType dtype, int64_t rows, int64_t columns, int64_t k, bool spoil) {
  const DType factor = random.below(2) ? dtype : FLOATS[random.below(4)];
  const Layout layout = any_layout(random);
  Matrix weight(dtype, rows, columns, layout), left(factor, rows, k, any_layout(random));
  Matrix right(factor, columns, k, any_layout(random));
  weight.fill(random), left.fill(random), right.fill(random);
  const bool copied = dtype == DType::f32 && random.below(2);
  Matrix copy(random.below(2) ? DType::bf16 : DType::f16, rows, columns, random.below(2) ? layout : Layout::padded);
  if (spoil && rows > 0 && k > 0) left.set(rows / 2, k - 1, NOT_A_NUMBER);
  const double alpha = 0.75;
  std::vector<double> expected = weight.numbers();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += left.get(i, p) * right.get(j, p);
      expected[size_t(i * columns + j)] += alpha * sum;
    }
  }
  rank_k_update(weight.view, left.view, right.view, alpha, copied ? copy.view : kf::TensorView{}, 1);
  const std::string what = call_of("rank_k_update", dtype, int(layout), rows, columns, k);
  report(close(weight.numbers(), expected, rank_k_limit(dtype)), what, "differs");
  report(weight.intact() && copy.intact() && left.intact() && right.intact(), what, "wrote beside its matrix");
  if (!copied) return;
  std::vector<double> narrowed = weight.numbers();
  for (double& v : narrowed) v = operands::rounded_to(copy.dtype, v);
  report(each_close(copy.numbers(), narrowed, 0, 0), what, "the copy is not its weight, rounded");
}

void check_symmetric(Random& random, DType dtype, int64_t n, int64_t d, bool spoil) {
  const DType sum_dtype = dtype == DType::f64 || random.below(2) ? DType::f64 : DType::f32;
  Matrix acc(sum_dtype, d, d, random.below(2) ? Layout::rows : Layout::padded);
  Matrix x(dtype, n, d, any_layout(random)), weights(DType::f64, 1, n);
  acc.fill(random), x.fill(random);
  std::vector<uint8_t> rows(size_t(n) + 1);
  for (int64_t r = 0; r < n; ++r) {
    weights.set(0, r, random.below(4) ? 0.25 + random.uniform() : 0);
    rows[size_t(r)] = random.below(4) != 0;
  }
  const bool weighted = random.below(2), masked = random.below(2);
  if (spoil && n > 1 && d > 0) {  // one row that counts, and one that is left out
    x.set(0, d / 2, NOT_A_NUMBER), weights.set(0, 0, 1), rows[0] = 1;
    x.set(n - 1, 0, NOT_A_NUMBER), weights.set(0, n - 1, 0), rows[size_t(n - 1)] = 0;
  }
  kf::TensorView mask;
  mask.data = rows.data(), mask.dtype = DType::u8, mask.ndim = 1, mask.shape[0] = n, mask.stride[0] = 1;
  const double alpha = 0.75;
  std::vector<double> expected = acc.numbers();
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < n; ++r) {
        const double w = weighted ? weights.get(0, r) : 1;
        if (w != 0 && (!masked || rows[size_t(r)])) sum += w * x.get(r, i) * x.get(r, j);
      }
      expected[size_t(i * d + j)] += alpha * sum;
    }
  }
  symmetric_rank_k_update(acc.view, x.view, weighted ? weights.vector() : kf::TensorView{},
                          masked ? mask : kf::TensorView{}, alpha, 1);
  const std::string what = call_of("symmetric_rank_k_update", dtype, n, d, weighted, masked);
  report(close(acc.numbers(), expected, dtype == DType::f64 ? 4e-15 : 6e-7), what, "differs");
  report(acc.intact() && x.intact() && weights.intact(), what, "wrote beside its matrix");
  bool upper = true;  // bits of the triangle that is never written
  const std::vector<double> after = acc.numbers();
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i + 1; j < d; ++j) upper &= after[size_t(i * d + j)] == expected[size_t(i * d + j)];
  }
  report(upper, what, "wrote above the diagonal");
}

// Of one result whose factor was rounded first: that rounding may go the other way, and the result is rounded again.
double element_limit(DType dtype) { return dtype == DType::f32 ? 5e-7 : dtype == DType::bf16 ? 0.012 : 1.5e-3; }
double element_tiny(DType dtype) { return dtype == DType::f16 ? 2.4e-7 : 1e-36; }

void check_rms_norm(Random& random, DType dtype, int64_t rows, int64_t d, bool spoil) {
  Matrix x(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded), out(dtype, rows, d);
  Matrix weight(random.below(2) ? dtype : DType::f32, 1, d);
  x.fill(random), weight.fill(random);
  if (spoil && rows > 1 && d > 1) x.set(rows / 2, d - 1, NOT_A_NUMBER), weight.set(0, d / 2, NOT_A_NUMBER);
  const bool round_first = random.below(2);
  std::vector<double> expected;
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0;
    for (int64_t j = 0; j < d; ++j) squares += x.get(i, j) * x.get(i, j);
    for (int64_t j = 0; j < d; ++j) {
      const double v = x.get(i, j) / std::sqrt(squares / double(d) + 1e-6);
      expected.push_back((round_first ? operands::rounded_to(dtype, v) : v) * weight.get(0, j));
    }
  }
  rms_norm(out.view, x.view, weight.vector(), 1e-6, round_first, 1);
  const std::string what = call_of("rms_norm", dtype, rows, d, round_first);
  report(each_close(out.numbers(), expected, element_limit(dtype), element_tiny(dtype)), what, "differs");
  report(out.intact() && x.intact() && weight.intact(), what, "wrote beside its matrix");
}

void check_rms_norm_backward(Random& random, DType dtype, int64_t rows, int64_t d, bool spoil) {
  Matrix x(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded), out(dtype, rows, d);
  Matrix grad(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded);
  Matrix weight(random.below(2) ? dtype : DType::f32, 1, d), rstd(DType::f32, 1, rows);
  x.fill(random), grad.fill(random), weight.fill(random);
  if (spoil && rows > 1 && d > 1) x.set(rows / 2, d - 1, NOT_A_NUMBER), grad.set(0, d / 2, NOT_A_NUMBER);
  std::vector<double> first, second;  // the gradient's two terms, which may cancel
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0, products = 0;
    for (int64_t j = 0; j < d; ++j) squares += x.get(i, j) * x.get(i, j);
    for (int64_t j = 0; j < d; ++j) products += grad.get(i, j) * weight.get(0, j) * x.get(i, j);
    rstd.set(0, i, 1 / std::sqrt(squares / double(d) + 1e-6));
    const double r = rstd.get(0, i);
    for (int64_t j = 0; j < d; ++j) {
      first.push_back(r * grad.get(i, j) * weight.get(0, j));
      second.push_back(x.get(i, j) * r * r * r * products / double(d));
    }
  }
  rms_norm_backward(out.view, grad.view, x.view, weight.vector(), rstd.vector(), 1);
  std::vector<double> result = out.numbers();
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] += second[i];
    if (std::isnan(second[i])) first[i] = NOT_A_NUMBER;
  }
  const std::string what = call_of("rms_norm_backward", dtype, rows, d, spoil);
  report(close(result, first, element_limit(dtype)), what, "differs");
  report(out.intact() && x.intact() && grad.intact() && weight.intact() && rstd.intact(), what, "wrote beside");
}

void check_gated_silu(Random& random, DType dtype, int64_t rows, int64_t d, bool spoil) {
  Matrix gate(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded), out(dtype, rows, d);
  Matrix up(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded);
  gate.fill(random, 4), up.fill(random);
  if (spoil && rows > 0 && d > 4) {
    const double special[] = {NOT_A_NUMBER, 1000, -1000, std::numeric_limits<double>::infinity()};
    for (int i = 0; i < 4; ++i) gate.set(rows - 1, d - 1 - i, special[i]);
  }
  std::vector<double> expected;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      const double g = gate.get(i, j);
      expected.push_back(operands::rounded_to(dtype, g / (1 + std::exp(-g))) * up.get(i, j));
    }
  }
  gated(Gate::silu, out.view, gate.view, up.view, 1);
  const std::string what = call_of("gated_silu", dtype, rows, d, spoil);
  report(each_close(out.numbers(), expected, element_limit(dtype), element_tiny(dtype)), what, "differs");
  report(out.intact() && gate.intact() && up.intact(), what, "wrote beside its matrix");
}

void check_gated_backward(Random& random, Gate activation, DType dtype, int64_t rows, int64_t d, bool spoil) {
  Matrix gate(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded), d_gate(dtype, rows, d);
  Matrix up(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded), d_up(dtype, rows, d);
  Matrix grad(dtype, rows, d, random.below(2) ? Layout::rows : Layout::padded);
  gate.fill(random, 2), up.fill(random), grad.fill(random);
  if (spoil && rows > 0 && d > 3) {
    const double special[] = {NOT_A_NUMBER, 1000, -1000};
    for (int i = 0; i < 3; ++i) gate.set(rows - 1, d - 1 - i, special[i]);
  }
  std::vector<double> in_gate, in_up;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      const double x = gate.get(i, j), c = 2 * std::sqrt(2 / 3.14159265358979323846);
      const bool silu = activation == Gate::silu;
      const double z = silu ? x : c * (x + 0.044715 * x * x * x), dz = silu ? 1 : c * (1 + 3 * 0.044715 * x * x);
      const double s = 1 / (1 + std::exp(-z));
      in_gate.push_back(grad.get(i, j) * up.get(i, j) * (s + x * dz * s * (1 - s)));
      in_up.push_back(grad.get(i, j) * operands::rounded_to(dtype, x * s));
    }
  }
  gated_backward(activation, d_gate.view, d_up.view, grad.view, gate.view, up.view, 1);
  const std::string what = call_of("gated_backward", dtype, rows, d, spoil);
  report(close(d_gate.numbers(), in_gate, element_limit(dtype)), what, "differs in the gate");
  report(close(d_up.numbers(), in_up, element_limit(dtype)), what, "differs beside the gate");
  report(d_gate.intact() && d_up.intact() && grad.intact() && gate.intact() && up.intact(), what, "wrote beside");
}

// Every 16-bit number widened, and numbers of all sizes narrowed, ties, subnormal and overflowing ones among them.
void check_conversions(Random& random) {
  for (DType dtype : {DType::bf16, DType::f16}) {
    std::vector<uint16_t> bits(65536);
    std::vector<float> wide(65536 + 1, 7.0f);
    for (int i = 0; i < 65536; ++i) bits[size_t(i)] = uint16_t(i);
    active_table().widen_row(bits.data(), dtype, 65536, wide.data());
    bool fine = wide[65536] == 7.0f;
    for (int i = 0; i < 65536; ++i) {
      const double expected = operands::read(dtype, &bits[size_t(i)]), v = wide[size_t(i)];
      fine &= std::isnan(expected) ? std::isnan(v) : v == expected && std::signbit(v) == std::signbit(expected);
    }
    report(fine, call_of("widen_row", dtype), "differs");

    const int64_t n = 40001;
    Matrix weight(DType::f32, 1, n), copy(dtype, 1, n), left(DType::f32, 1, 0), right(DType::f32, n, 0);
    std::vector<double> expected;
    for (int64_t j = 0; j < n; ++j) {
      double v = std::ldexp(random.normal(), int(random.below(60)) - 40);
      if (j % 3 == 0) {  // half way between two neighbors, or next to it
        const uint16_t here = uint16_t(random.below(dtype == DType::f16 ? 0x7c00 : 0x7f00));
        const uint16_t next = uint16_t(here + 1);
        const double a = operands::read(dtype, &here), b = operands::read(dtype, &next);
        v = std::isinf(b) ? 65520 - 16 * double(random.below(2)) : (a + b) / 2;
        if (random.below(2)) v = std::nextafter(float(v), random.below(2) ? 0.0f : 1e30f);
      }
      weight.set(0, j, random.below(2) ? -v : v);
      expected.push_back(operands::rounded_to(dtype, weight.get(0, j)));
    }
    rank_k_update(weight.view, left.view, right.view, 1.0, copy.view, 1);
    report(each_close(copy.numbers(), expected, 0, 0), call_of("a copy", dtype), "is not rounded to the nearest");
  }
}

struct Tails {
  int64_t size, prefix, tail, share, window;
  double softcap;
};

// Two rows, of `tail` tokens and of one, over one stored prefix each, with two groups of heads: outputs and gradients.
void check_tail_attention(Random& random, const Tails& t) {
  constexpr int64_t GROUPS = 2;
  const int64_t tokens = t.tail + 1, heads = GROUPS * t.share, places = t.prefix + 2;
  std::vector<int64_t> starts = {0, t.tail, tokens}, spans = {1, 1 + t.prefix, 0, t.prefix};
  const auto numbers = [&](int64_t count) {
    std::vector<float> v(size_t(count) + 16, 7.0f);  // canaries behind
    for (int64_t i = 0; i < count; ++i) v[size_t(i)] = float(random.normal());
    return v;
  };
  const auto view = [](std::vector<float>& v, std::initializer_list<int64_t> shape) {
    kf::TensorView view;
    view.data = v.data();
    for (int64_t n : shape) view.shape[view.ndim++] = n;
    for (int64_t i = view.ndim, step = 1; i-- > 0; step *= view.shape[i]) view.stride[i] = step;
    return view;
  };
  const auto indices = [](std::vector<int64_t>& v, int64_t columns) {
    kf::TensorView view;
    view.data = v.data();
    view.dtype = DType::i64;
    view.ndim = columns > 1 ? 2 : 1;
    view.shape[0] = int64_t(v.size()) / columns;
    view.shape[1] = view.stride[0] = columns;
    view.stride[1] = 1;
    return view;
  };
  const int64_t wide = tokens * heads * t.size, narrow = tokens * GROUPS * t.size;
  auto query = numbers(wide), key = numbers(narrow), value = numbers(narrow), grad = numbers(wide);
  auto prefix_keys = numbers(2 * GROUPS * places * t.size), prefix_values = numbers(2 * GROUPS * places * t.size);
  auto out = numbers(wide), of_query = numbers(wide), of_key = numbers(narrow), of_value = numbers(narrow);
  auto normalizer = numbers(tokens * heads * 2);
  const double scale = 1 / std::sqrt(double(t.size));
  const auto heads_of = [&](std::vector<float>& v, int64_t n) { return view(v, {tokens, n, t.size}); };
  const auto stored = [&](std::vector<float>& v) { return view(v, {2, GROUPS, places, t.size}); };
  const TailAttentionInputs inputs = {heads_of(query, heads),
                                      heads_of(key, GROUPS),
                                      heads_of(value, GROUPS),
                                      indices(starts, 1),
                                      stored(prefix_keys),
                                      stored(prefix_values),
                                      indices(spans, 2),
                                      kf::TensorView(),
                                      scale,
                                      t.softcap,
                                      t.window};
  const auto scratch = view(normalizer, {tokens, heads, 2});
  tail_attention(heads_of(out, heads), scratch, inputs, 1);
  tail_attention_backward(heads_of(of_query, heads), heads_of(of_key, GROUPS), heads_of(of_value, GROUPS),
                          heads_of(grad, heads), scratch, inputs, 1);

  std::vector<double> results(size_t(2 * wide + 2 * narrow), 0.0);
  double *y = results.data(), *dq = y + wide, *dk = dq + wide, *dv = dk + narrow;
  const auto dot = [&](const float* a, const float* b) {
    double sum = 0;
    for (int64_t d = 0; d < t.size; ++d) sum += double(a[d]) * double(b[d]);
    return sum;
  };
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t row = token >= t.tail, group = head / t.share, at = (token * heads + head) * t.size;
      const int64_t end = t.prefix + token - starts[size_t(row)] + 1;
      const int64_t begin = t.window > 0 && end > t.window ? end - t.window : 0;
      std::vector<double> weight, bend, slope;
      const auto tail_at = [&](int64_t j) { return ((starts[size_t(row)] + j - t.prefix) * GROUPS + group) * t.size; };
      const auto at_key = [&](std::vector<float>& before, std::vector<float>& tail, int64_t j) {
        const int64_t place = ((row * GROUPS + group) * places + spans[size_t(2 * row)] + j) * t.size;
        return j < t.prefix ? &before[size_t(place)] : &tail[size_t(tail_at(j))];
      };
      double total = 0, mean = 0;
      for (int64_t j = begin; j < end; ++j) {
        double score = scale * dot(&query[size_t(at)], at_key(prefix_keys, key, j));
        bend.push_back(1);
        if (t.softcap > 0) {
          const double bent = std::tanh(score / t.softcap);
          score = t.softcap * bent;
          bend.back() = 1 - bent * bent;
        }
        weight.push_back(std::exp(score));
        total += weight.back();
      }
      for (int64_t j = begin; j < end; ++j) {
        double& w = weight[size_t(j - begin)];
        w /= total;
        const float* v = at_key(prefix_values, value, j);
        slope.push_back(dot(&grad[size_t(at)], v));
        mean += w * slope.back();
        for (int64_t d = 0; d < t.size; ++d) y[at + d] += w * double(v[d]);
      }
      for (int64_t j = begin; j < end; ++j) {
        const double w = weight[size_t(j - begin)];
        const double by_product = w * (slope[size_t(j - begin)] - mean) * bend[size_t(j - begin)] * scale;
        const float* k = at_key(prefix_keys, key, j);
        for (int64_t d = 0; d < t.size; ++d) {
          dq[at + d] += by_product * double(k[d]);
          if (j < t.prefix) continue;
          dk[tail_at(j) + d] += by_product * double(query[size_t(at + d)]);
          dv[tail_at(j) + d] += w * double(grad[size_t(at + d)]);
        }
      }
    }
  }
  const std::string call = call_of("tail_attention", DType::f32, t.size, t.prefix, t.tail, t.share, t.window);
  const double* expected = y;
  for (const auto* part : {&out, &of_query, &of_key, &of_value}) {
    const auto count = int64_t(part->size()) - 16;
    report(close({part->begin(), part->end() - 16}, {expected, expected + count}, 2e-6), call, "is not close");
    report(std::all_of(part->end() - 16, part->end(), [](float v) { return v == 7.0f; }), call, "wrote behind the end");
    expected += count;
  }
}

void check_all() {
  Random random(7);
  check_conversions(random);
  for (bool spoil : {false, true}) {
    for (int64_t rows : SIZES) {
      for (int64_t columns : SIZES) {
        for (DType dtype : FLOATS) {
          // A third size for every product of the first two, so that each triple of sizes comes with some dtype.
          for (size_t i = size_t(dtype) % 2; i < std::size(SIZES); i += 2) {
            check_rank_k(random, dtype, rows, columns, SIZES[i], spoil);
          }
          check_symmetric(random, dtype, rows, columns, spoil);
          if (dtype == DType::f64) continue;
          check_rms_norm(random, dtype, rows, columns, spoil);
          check_gated_silu(random, dtype, rows, columns, spoil);
          check_rms_norm_backward(random, dtype, rows, columns, spoil);
          check_gated_backward(random, Gate::silu, dtype, rows, columns, spoil);
          check_gated_backward(random, Gate::gelu_tanh, dtype, rows, columns, spoil);
        }
      }
    }
  }
  for (int64_t size : {1, 7, 32, 63, 64, 65}) {
    for (int64_t share : {1, 3}) {
      for (int64_t prefix : {0, 1, 9}) {
        check_tail_attention(random, {size, prefix, 1, share, 0, 0});
        check_tail_attention(random, {size, prefix, 7, share, 0, 2.0});
        check_tail_attention(random, {size, prefix, 37, share, 5, 0});
      }
    }
  }
  check_symmetric(random, DType::f32, 4200, 11, false);  // more rows than are packed at a time
  check_rank_k(random, DType::f32, 13, 21, 700, false);  // a longer sum than goes without a stop
}

}  // namespace

int main() {
  int sets = 0;
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::neon}) {
    if (const std::string reason = refusal(isa); !reason.empty()) {
      std::printf("%s skipped: %s\n", kf::isa_name(isa), reason.c_str());
      continue;
    }
    select_isa(isa);
    check_all();
    std::printf("%s checked\n", kf::isa_name(isa));
    ++sets;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed || sets == 0;
}
