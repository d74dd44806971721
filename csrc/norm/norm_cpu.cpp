// add_layer_norm on the CPU: a row is read once, summed and normalised in the cache, and written once.
#include "common/cpu/dropout_vec.h"
#include "common/cpu/row.h"
#include "common/cpu/threads.h"
#include "norm/norm.h"

namespace lwft::LWFT_ISA {
namespace {

// Rows of one forward task: enough to outweigh handing it to a thread, few enough to balance short batches.
constexpr int64_t kForwardRows = 16;
// Backward tasks keep a partial sum of dweight and dbias each; so many at most, whatever the number of tokens.
constexpr int64_t kBackwardTasks = 64;
// Rows of backward whose shares of dweight and dbias are summed in registers: they stay in the first-level cache.
constexpr int64_t kBlockRows = 4;

// The rows of a tensor as Storage: in place, or converted to T into a buffer (then Storage is T).
template <class T, class Storage>
const Storage* row_as(DType dtype, const void* base, int64_t offset, int64_t n, Storage* buffer) {
  if constexpr (std::is_same_v<T, Storage>) {
    return view_row(dtype, base, offset, n, buffer);
  } else {
    return static_cast<const Storage*>(base) + offset;
  }
}

// x + dropout(u), column by column, for body(at, k, sum). X is the storage of x and of u. `buffer` (2 d) is for rows that
// must be converted first.
template <class T, class X, class Params, class Body>
LWFT_INLINE inline void for_residual_sum(const Params& p, int64_t token, T* buffer, const Body& body) {
  const int64_t d = p.model_dim;
  X* x_buffer = nullptr;
  if constexpr (std::is_same_v<T, X>) x_buffer = buffer + d;
  const X* x = row_as<T>(p.x_dtype, p.x, token * p.x_row_stride, d, x_buffer);
  const int64_t u_offset = token * p.sublayer_row_stride;
  const auto add = [&](const auto* u) LWFT_INLINE {
    for_columns<T>(d, [&](auto at, int k) LWFT_INLINE { body(at, k, load_at<T>(x, at) + load_at<T>(u, at)); });
  };
  if (p.dropout.active()) {
    load_row(p.sublayer_dtype, p.sublayer_out, u_offset, d, buffer);
    dropout_row(p.dropout, token, 0, d, buffer);
    add(buffer);
  } else if constexpr (std::is_same_v<T, X>) {
    add(row_as<T>(p.sublayer_dtype, p.sublayer_out, u_offset, d, buffer));
  } else {
    add(static_cast<const X*>(p.sublayer_out) + u_offset);
  }
}

template <class T, class X>
void forward_rows(const AddLayerNormForward& p, const T* weight, const T* bias, int64_t begin, int64_t end) {
  const int64_t d = p.model_dim;
  X* result = static_cast<X*>(p.out);  // mixed dtypes of x and u make a sum of T
  const bool streams = may_stream<T>(p.out_dtype, p.out, p.tokens, d);
  Scratch scratch;
  T* s = scratch.take<T>(d);
  T* buffer = scratch.take<T>(2 * d);
  for (int64_t token = begin; token < end; ++token) {
    RowSum<T> total;
    for_residual_sum<T, X>(p, token, buffer, [&](auto at, int k, Vec<T> value) LWFT_INLINE {
      store_at<T>(s, at, value);
      total.part[k] += value;
    });
    const T mean = total.total() / static_cast<T>(d);
    const T rstd = inverse_deviation(s, d, mean, p.eps);
    X* out = result + token * d;
    for_columns<T>(d, [&](auto at, int) LWFT_INLINE {
      const Vec<T> normalised = (load_at<T>(s, at) - mean) * rstd;
      write_at<T>(streams, out, at, fma(normalised, load_at<T>(weight, at), load_at<T>(bias, at)));
    });
    static_cast<T*>(p.mean)[token] = mean;
    static_cast<T*>(p.rstd)[token] = rstd;
  }
  if (streams) finish_streaming();
}

template <class T, class X>
void forward_as(const AddLayerNormForward& p) {
  const int64_t d = p.model_dim;
  Scratch scratch;
  const T* weight = parameter_row(p.param_dtype, p.weight, d, T{1}, scratch);
  const T* bias = parameter_row(p.param_dtype, p.bias, d, T{0}, scratch);
  parallel_for(ceil_div(p.tokens, kForwardRows), [&](int64_t task) {
    const int64_t begin = task * kForwardRows;
    forward_rows<T, X>(p, weight, bias, begin, minimum(begin + kForwardRows, p.tokens));
  });
}

// What a block of backward's rows needs of each: n = (s - mean) rstd, grad_out, and the means of g and g n.
template <class T, class X>
struct BlockRow {
  T* n;
  const X* grad_out;
  Vec<T> rstd, mean_g, mean_gn;
};

template <class T, class X>
class Backward {
 public:
  explicit Backward(const AddLayerNormBackward& p) : p_(p), d_(p.model_dim) {}

  void run() const {
    const int64_t rows = maximum(kForwardRows, ceil_div(p_.tokens, kBackwardTasks));
    const int64_t tasks = ceil_div(p_.tokens, rows);
    Scratch scratch;
    const T* weight = parameter_row(p_.param_dtype, p_.weight, d_, T{1}, scratch);
    T* dweight = scratch.take<T>((tasks + 1) * d_);  // the last row of each is for the sum of the others
    T* dbias = scratch.take<T>((tasks + 1) * d_);
    for (int64_t i = 0; i < (tasks + 1) * d_; ++i) dweight[i] = dbias[i] = T{0};
    parallel_for(tasks, [&](int64_t task) {
      const int64_t end = minimum((task + 1) * rows, p_.tokens);
      for (int64_t begin = task * rows; begin < end; begin += kBlockRows) {
        block(weight, dweight + task * d_, dbias + task * d_, begin, minimum(kBlockRows, end - begin));
      }
    });
    finish(dweight, tasks, p_.dweight);
    finish(dbias, tasks, p_.dbias);
  }

 private:
  // n = (s - mean) rstd and g = grad_out * weight; ds = rstd (g - mean(g) - n mean(g n)). The shares of dweight
  // (grad_out * n) and dbias (grad_out) are added to the task's partial sums.
  void block(const T* weight, T* dweight, T* dbias, int64_t begin, int64_t count) const {
    Scratch scratch;
    T* buffer = scratch.take<T>(2 * d_);
    BlockRow<T, X> rows[kBlockRows];
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = first_pass(weight, begin + r, scratch.take<T>(d_), buffer, scratch);
    }
    if (p_.dx == nullptr && p_.dsublayer_out == nullptr) {
      return second_pass<false>(weight, dweight, dbias, rows, count, nullptr, false);
    }
    X* dx = p_.x_dtype == dtype_of<X>() && p_.dx != nullptr ? static_cast<X*>(p_.dx) + begin * d_ : nullptr;
    const bool convert_dx = p_.dx != nullptr && dx == nullptr, keep = convert_dx || p_.dsublayer_out != nullptr;
    second_pass<true>(weight, dweight, dbias, rows, count, dx, keep);
    for (int64_t r = 0; r < count && keep; ++r) {
      const int64_t at = (begin + r) * d_;
      if (convert_dx) store_row(p_.x_dtype, rows[r].n, d_, p_.dx, at);
      if (p_.dsublayer_out == nullptr) continue;
      if (p_.dropout.active()) dropout_row(p_.dropout, begin + r, 0, d_, rows[r].n);
      store_row(p_.sublayer_dtype, rows[r].n, d_, p_.dsublayer_out, at);
    }
  }

  BlockRow<T, X> first_pass(const T* weight, int64_t token, T* n, T* buffer, Scratch& scratch) const {
    const T mean = static_cast<const T*>(p_.mean)[token], rstd = static_cast<const T*>(p_.rstd)[token];
    X* grad_buffer = nullptr;
    if constexpr (std::is_same_v<T, X>) grad_buffer = scratch.take<X>(d_);
    const X* grad_out = row_as<T>(p_.out_dtype, p_.grad_out, token * p_.grad_out_row_stride, d_, grad_buffer);
    RowSum<T> sum_g, sum_gn;
    for_residual_sum<T, X>(p_, token, buffer, [&](auto at, int k, Vec<T> s) LWFT_INLINE {
      // lanes past the end have grad_out = 0, so what n is there does not matter
      const Vec<T> normalised = (s - mean) * rstd, g = load_at<T>(grad_out, at) * load_at<T>(weight, at);
      store_at<T>(n, at, normalised);
      sum_g.part[k] += g;
      sum_gn.part[k] = fma(g, normalised, sum_gn.part[k]);
    });
    const T width = static_cast<T>(d_);
    return {n, grad_out, broadcast(rstd), broadcast(sum_g.total() / width), broadcast(sum_gn.total() / width)};
  }

  // Column by column over the rows of the block. ds goes to dx unless that is null, and replaces n if it is to be kept.
  template <bool kWanted>
  void second_pass(const T* weight, T* dweight, T* dbias, const BlockRow<T, X>* rows, int64_t count, X* dx,
                   bool keep) const {
    const bool streams = dx != nullptr && may_stream<T>(p_.x_dtype, p_.dx, p_.tokens, d_);
    for_columns<T>(d_, [&](auto at, int) LWFT_INLINE {
      const Vec<T> w = load_at<T>(weight, at);
      Vec<T> dw = load_at<T>(dweight, at), db = load_at<T>(dbias, at);
      for (int64_t r = 0; r < count; ++r) {
        const Vec<T> n = load_at<T>(rows[r].n, at), dy = load_at<T>(rows[r].grad_out, at);
        dw = fma(dy, n, dw);
        db += dy;
        if constexpr (kWanted) {
          const Vec<T> ds = (dy * w - rows[r].mean_g - n * rows[r].mean_gn) * rows[r].rstd;
          if (dx != nullptr) write_at<T>(streams, dx + r * d_, at, ds);
          if (keep) store_at<T>(rows[r].n, at, ds);
        }
      }
      store_at<T>(dweight, at, dw);
      store_at<T>(dbias, at, db);
    });
    if (streams) finish_streaming();
  }

  void finish(T* partial, int64_t tasks, void* result) const {
    if (result == nullptr) return;
    T* total = partial + tasks * d_;
    for (int64_t task = 0; task < tasks; ++task) {
      for (int64_t j = 0; j < d_; ++j) total[j] += partial[task * d_ + j];
    }
    store_row(p_.param_dtype, total, d_, result, 0);
  }

  const AddLayerNormBackward& p_;
  const int64_t d_;
};

// run(T, X): the arithmetic type and the storage of all activations; T for both where they differ among themselves.
template <class Params, class Run>
void by_dtype(const Params& p, const Run& run) {
  if (p.out_dtype == DType::f64) return run(double{}, double{});
  if (p.x_dtype != p.sublayer_dtype || p.out_dtype == DType::f32) return run(float{}, float{});
  if (p.out_dtype == DType::bf16) return run(float{}, BFloat16{});
  run(float{}, Float16{});
}

void forward(const AddLayerNormForward& p) {
  by_dtype(p, [&](auto sum, auto storage) { forward_as<decltype(sum), decltype(storage)>(p); });
}

void backward(const AddLayerNormBackward& p) {
  by_dtype(p, [&](auto sum, auto storage) { Backward<decltype(sum), decltype(storage)>(p).run(); });
}

}  // namespace

extern const NormKernels norm_kernels;
constexpr NormKernels norm_kernels = {forward, backward};

}  // namespace lwft::LWFT_ISA
