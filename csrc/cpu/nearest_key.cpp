// Distances are sums over parts of the columns, in order. They only grow, so a pair whose sum over the first parts
// exceeds the whole sum of another pair needs no more of them, whatever the rounding. Where the first part tells
// little, a product of queries and keys, made elsewhere, says which keys cannot be the nearest. Either way the result
// is that of comparing all distances.
#include "nearest_key.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "../common/aligned_buffer.h"
#include "by_rows.h"
#include "kernel_table.h"

namespace kf::cpu {
namespace {

constexpr int64_t KEYS = 64;                          // keys of a task
constexpr int64_t PARTIAL_BYTES = int64_t(32) << 20;  // sums over the first part in memory at a time

// The best key of every query so far. A distance of NaN is compared as infinity.
template <class T>
struct Best {
  static constexpr T INF = std::numeric_limits<T>::infinity();
  std::vector<T> value, distance;  // as compared, and as returned
  std::vector<int64_t> index;
  std::vector<T> limit;  // sums of squares above it are of larger distances

  explicit Best(int64_t queries)
      : value(queries, INF),
        distance(queries, INF),
        index(queries, std::numeric_limits<int64_t>::max()),
        limit(queries, INF) {}

  void take(int64_t q, T found, int64_t at) {
    const T compared = std::isnan(found) ? INF : found;
    if (compared < value[q] || (compared == value[q] && at < index[q])) {
      value[q] = compared;
      distance[q] = found;
      index[q] = at;
      limit[q] = compared * compared * (T(1) + 16 * std::numeric_limits<T>::epsilon());
    }
  }
};

// Parts of the columns are computed from packed rows: rows of a power of two would share few lines of the caches.
constexpr int64_t PACKED_STRIDE = NEAREST_DEPTH + 16;

template <class T>
void pack_rows(const TensorView& from, int64_t row, int64_t rows, int64_t column, const KernelTable& table, T* to) {
  const int64_t count = std::min(NEAREST_DEPTH, from.shape[1] - column), size = item_size(from.dtype);
  for (int64_t i = 0; i < rows; ++i) {
    const char* source = static_cast<const char*>(from.data) + ((row + i) * from.stride[0] + column) * size;
    if (size == int64_t(sizeof(T))) {
      std::memcpy(to + i * PACKED_STRIDE, source, size_t(count) * sizeof(T));
    } else {
      table.widen_row(source, from.dtype, count, reinterpret_cast<float*>(to) + i * PACKED_STRIDE);
    }
  }
}

template <class T>
struct Search {
  const TensorView& queries;
  const TensorView& keys;
  const KernelTable& table;
  void (*add_squares)(const NearestBlock<T>&);

  // sums [count, stride] += squares of the differences of packed queries to keys [row, row + rows), in the columns from
  // `column` on.
  void add(const T* packed, int64_t count, int64_t row, int64_t rows, int64_t column, T* key_buffer, const T* limits,
           T* sums, int64_t stride) const {
    pack_rows(keys, row, rows, column, table, key_buffer);
    const int64_t depth = std::min(NEAREST_DEPTH, keys.shape[1] - column);
    add_squares({packed, PACKED_STRIDE, count, key_buffer, PACKED_STRIDE, rows, depth, sums, stride, limits});
  }

  // Queries [begin, begin + n) against all keys.
  class Group {
   public:
    Group(const Search& of, int64_t begin, int64_t n, int threads)
        : of_(of),
          n_(n),
          d_(of.queries.shape[1]),
          k_(of.keys.shape[0]),
          tasks_((k_ + KEYS - 1) / KEYS),
          parts_(std::max<int64_t>(1, (d_ + NEAREST_DEPTH - 1) / NEAREST_DEPTH)),
          members_(worthwhile_threads(double(n) * double(k_) * double(d_), 1 << 20, threads)),
          packed_(size_t(parts_) * size_t(n * PACKED_STRIDE) * sizeof(T)),
          best_(n) {
      for (int64_t p = 0; p < parts_; ++p) pack_rows(of.queries, begin, n, p * NEAREST_DEPTH, of.table, part(p));
    }

    // sums [n, k] over the first part of the columns, and for each query the whole distance to the key with the
    // smallest.
    void first_parts(T* sums) {
      each_task(tasks_, [&](int64_t t, T* buffer) {
        for (int64_t q = 0; q < n_; ++q) std::fill_n(sums + q * k_ + t * KEYS, rows_at(t), T(0));
        of_.add(part(0), n_, t * KEYS, rows_at(t), 0, buffer, best_.limit.data(), sums + t * KEYS, k_);
      });
      each_task(n_, [&](int64_t q, T* buffer) {
        const T* row = sums + q * k_;
        const int64_t at = std::min_element(row, row + k_) - row;
        best_.take(q, std::sqrt(whole_sum(q, at, 1, row[at], buffer)), at);
      });
    }

    // product [n, k] of queries and keys becomes 0, or infinity where the key cannot be the nearest. With |q|^2 and
    // |k|^2 summed like distances, |q|^2 + |k|^2 - 2 q k is off by at most 2 gamma (|q|^2 + |k|^2) in any order of
    // summation, gamma = d u / (1 - d u) with the unit roundoff u, and a sum of squares by gamma of itself; `slack` is
    // twice gamma.
    void bound(T* product) {
      const double slack = double(d_ + 16) * std::numeric_limits<T>::epsilon();
      const double tiny = double(d_) * std::numeric_limits<T>::min();
      std::vector<T> of_queries(n_), of_keys(k_);
      const std::vector<T> zero(PACKED_STRIDE, T(0));
      const T unlimited = Best<T>::INF;
      each_task(tasks_, [&](int64_t t, T* buffer) {
        T sums[KEYS] = {};
        for (int64_t p = 0; p < parts_; ++p) {
          of_.add(zero.data(), 1, t * KEYS, rows_at(t), p * NEAREST_DEPTH, buffer, &unlimited, sums, KEYS);
        }
        std::copy_n(sums, rows_at(t), &of_keys[t * KEYS]);
      });
      each_task(n_, [&](int64_t q, T* buffer) {
        for (int64_t p = 0; p < parts_; ++p) {
          const int64_t depth = std::min(NEAREST_DEPTH, d_ - p * NEAREST_DEPTH);
          const T* row = part(p) + q * PACKED_STRIDE;
          of_.add_squares({zero.data(), PACKED_STRIDE, 1, row, PACKED_STRIDE, 1, depth, &of_queries[q], 1, &unlimited});
        }
        T* row = product + q * k_;
        int64_t at = 0;
        double least = std::numeric_limits<double>::infinity();
        for (int64_t j = 0; j < k_; ++j) {
          const double sum = double(of_keys[j]) - 2 * double(row[j]);
          if (sum < least) least = sum, at = j;
        }
        best_.take(q, std::sqrt(whole_sum(q, at, 0, T(0), buffer)), at);
        const double limit = best_.limit[q];
        for (int64_t j = 0; j < k_; ++j) {
          const double norms = double(of_queries[q]) + double(of_keys[j]);
          const double lower = (norms * (1 - slack) - 2 * double(row[j]) - tiny) * (1 - slack);
          row[j] = lower > limit ? unlimited : T(0);
        }
      });
    }

    // Pairs whose sums [n, k] over parts before `first` are not larger than the best of their query.
    int64_t open_pairs(const T* sums) const {
      int64_t count = 0;
      for (int64_t q = 0; q < n_; ++q) {
        for (int64_t j = 0; j < k_; ++j) count += !(sums[q * k_ + j] > best_.limit[q]);
      }
      return count;
    }

    // The rest of the sums, from part `first` on, where they are open.
    void finish(const T* first_sums, int64_t first) {
      std::mutex mutex;
      const Best<T> start = best_;
      Counter next;
      run_team(members_, [&](int, Team&) {
        std::vector<T> buffer(KEYS * PACKED_STRIDE), sums(n_ * KEYS);
        Best<T> mine = start;
        for (int64_t t; (t = next.take()) < tasks_;)
          finish_task(t, first_sums, first, mine, sums.data(), buffer.data());
        const std::lock_guard<std::mutex> lock(mutex);
        for (int64_t q = 0; q < n_; ++q) best_.take(q, mine.distance[q], mine.index[q]);
      });
    }

    const Best<T>& best() const { return best_; }

   private:
    T* part(int64_t p) const { return packed_.template get<T>() + p * n_ * PACKED_STRIDE; }
    int64_t rows_at(int64_t t) const { return std::min(KEYS, k_ - t * KEYS); }

    template <class Body>
    void each_task(int64_t count, Body&& body) {
      Counter next;
      run_team(members_, [&](int, Team&) {
        std::vector<T> buffer(KEYS * PACKED_STRIDE);
        for (int64_t t; (t = next.take()) < count;) body(t, buffer.data());
      });
    }

    // The sum of query q and key `at` over parts from `first` on, added to `sum`.
    T whole_sum(int64_t q, int64_t at, int64_t first, T sum, T* buffer) const {
      const T unlimited = Best<T>::INF;
      for (int64_t p = first; p < parts_; ++p) {
        of_.add(part(p) + q * PACKED_STRIDE, 1, at, 1, p * NEAREST_DEPTH, buffer, &unlimited, &sum, 1);
      }
      return sum;
    }

    void finish_task(int64_t t, const T* first_sums, int64_t first, Best<T>& mine, T* sums, T* buffer) const {
      bool open[KEYS] = {};
      for (int64_t q = 0; q < n_; ++q) {
        const T* from = first_sums + q * k_ + t * KEYS;
        std::copy_n(from, rows_at(t), sums + q * KEYS);
        for (int64_t j = 0; j < rows_at(t); ++j) open[j] |= !(from[j] > mine.limit[q]);
      }
      const int64_t count = std::count(open, open + KEYS, true);
      for (int64_t j = 0; count > 0 && j < rows_at(t); ++j) {  // few keys one by one, many together
        const int64_t rows = count > KEYS / 4 ? rows_at(t) : 1;
        for (int64_t p = first; p < parts_ && (rows > 1 || open[j]); ++p) {
          of_.add(part(p), n_, t * KEYS + j, rows, p * NEAREST_DEPTH, buffer, mine.limit.data(), sums + j, KEYS);
        }
        if (rows > 1) break;
      }
      for (int64_t q = 0; count > 0 && q < n_; ++q) {
        for (int64_t j = 0; j < rows_at(t); ++j) {
          const T sum = sums[q * KEYS + j];
          if (open[j] && !(sum > mine.limit[q])) mine.take(q, std::sqrt(sum), t * KEYS + j);
        }
      }
    }

    const Search& of_;
    const int64_t n_, d_, k_, tasks_, parts_;
    const int members_;
    const AlignedBuffer packed_;
    Best<T> best_;
  };
};

template <class T>
Search<T> search_of(const TensorView& queries, const TensorView& keys) {
  const KernelTable& table = active_table();
  if constexpr (sizeof(T) == 8) return {queries, keys, table, table.add_squares_f64};
  else return {queries, keys, table, table.add_squares_f32};
}

template <class T>
void search(const TensorView& index, const TensorView& distance, const TensorView& queries, const TensorView& keys,
            const TensorView& product, int threads) {
  const Search<T> of = search_of<T>(queries, keys);
  const int64_t n = queries.shape[0], k = keys.shape[0];
  const int64_t size = product.defined() ? n : std::max<int64_t>(1, PARTIAL_BYTES / (k * int64_t(sizeof(T))));
  for (int64_t begin = 0; begin < n; begin += size) {
    const int64_t count = std::min(size, n - begin);
    typename Search<T>::Group group(of, begin, count, threads);
    if (product.defined()) {
      group.bound(static_cast<T*>(product.data));
      group.finish(static_cast<T*>(product.data), 0);
    } else {
      const AlignedBuffer sums(size_t(count) * size_t(k) * sizeof(T));
      group.first_parts(sums.get<T>());
      group.finish(sums.get<T>(), 1);
    }
    std::copy_n(group.best().index.data(), count, static_cast<int64_t*>(index.data) + begin);
    std::copy_n(group.best().distance.data(), count, static_cast<T*>(distance.data) + begin);
  }
}

template <class T>
double open_share(const TensorView& queries, const TensorView& keys, int threads) {
  const Search<T> of = search_of<T>(queries, keys);
  const int64_t n = queries.shape[0], k = keys.shape[0];
  const AlignedBuffer sums(size_t(n) * size_t(k) * sizeof(T));
  typename Search<T>::Group group(of, 0, n, threads);
  group.first_parts(sums.get<T>());
  return double(group.open_pairs(sums.get<T>())) / (double(n) * double(k));
}

void check_operands(const TensorView& queries, const TensorView& keys) {
  require(queries.ndim == 2 && (queries.dtype == DType::f32 || queries.dtype == DType::f64),
          "queries must be a matrix of float32 or float64");
  check_floats(keys, "keys");
  const int64_t d = queries.shape[1];
  require(keys.ndim == 2 && keys.shape[1] == d && keys.shape[0] > 0, "keys must be [K, d] with K > 0");
  require((keys.dtype == DType::f64) == (queries.dtype == DType::f64),
          "keys must be float64 where queries are, and only there");
  require(d <= 1 || (queries.stride[1] == 1 && keys.stride[1] == 1), "queries and keys must have contiguous rows");
}

}  // namespace

void nearest_key(const TensorView& index, const TensorView& distance, const TensorView& queries, const TensorView& keys,
                 const TensorView& product, int threads) {
  check_operands(queries, keys);
  const int64_t n = queries.shape[0], k = keys.shape[0];
  check_vector(index, "index", n, DType::i64);
  check_vector(distance, "distance", n, queries.dtype);
  if (product.defined()) {
    require(product.ndim == 2 && product.dtype == queries.dtype, "product must be a matrix of the dtype of queries");
    require(product.shape[0] == n && product.shape[1] == k, "product must be [N, K]");
    require((n <= 1 || product.stride[0] == k) && (k <= 1 || product.stride[1] == 1), "product must be contiguous");
  }
  if (n == 0) return;
  if (queries.dtype == DType::f64) return search<double>(index, distance, queries, keys, product, threads);
  search<float>(index, distance, queries, keys, product, threads);
}

double nearest_open_share(const TensorView& queries, const TensorView& keys, int threads) {
  check_operands(queries, keys);
  if (queries.shape[0] == 0) return 0;
  if (queries.dtype == DType::f64) return open_share<double>(queries, keys, threads);
  return open_share<float>(queries, keys, threads);
}

}  // namespace kf::cpu
