// The low-rank product by level, for python_tests/lowrank/test_levels.py and python_tests/cuda.
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <vector>

#include "harness/harness.h"
#include "lowrank/lowrank.h"

namespace lwft::harness {

namespace {

using Index = std::optional<py::array_t<int64_t>>;

// x (T, d_in); a (n, r, d_in), b (n, d_out, r) of one dtype; adapter_index (T,) int64, or None for adapter 0.
// Level "cuda" is the CUDA kernel in its emulation; ValueError says why it declines.
template <class Parameters>
void fill(Parameters& p, const py::array& x, const py::array& a, const py::array& b, const Index& adapter_index,
          double scale, uint64_t seed, uint64_t offset, double dropout_p) {
  p.tokens = x.shape(0);
  p.in_features = x.shape(1);
  p.adapters = a.shape(0);
  p.rank = a.shape(1);
  p.out_features = b.shape(1);
  p.x_dtype = p.out_dtype = p.bias_dtype = dtype_of(x);
  p.param_dtype = dtype_of(a);
  p.x = x.data();
  p.x_row_stride = stride(x, 0);
  p.a = a.data();
  p.b = b.data();
  if (adapter_index) p.adapter_index = adapter_index->data();
  p.scale = scale;
  p.dropout = make_dropout(seed, offset, dropout_p);
}

struct alignas(16) Aligned16 {
  float value[4];
};

template <class Parameters>
void run_emulated(Parameters& p, int64_t (*workspace_floats)(const Parameters&),
                  int (*kernel)(const Parameters&, void*)) {
  if (const char* reason = low_rank_cuda_declines(p)) throw py::value_error(reason);
  std::vector<Aligned16> workspace(static_cast<size_t>(workspace_floats(p)) / 4 + 1, Aligned16{{NAN, NAN, NAN, NAN}});
  p.workspace = workspace.data();
  kernel(p, nullptr);
}

// out = bias + ..., or base_out + ... where that is given; and hidden.
py::tuple forward(const std::string& level, const py::array& x, const py::array& a, const py::array& b,
                  const py::array& bias, const py::object& base_out, const Index& adapter_index, double scale,
                  uint64_t seed, uint64_t offset, double dropout_p) {
  LowRankForward p{};
  fill(p, x, a, b, adapter_index, scale, seed, offset, dropout_p);
  p.bias = bias.data();
  p.bias_dtype = dtype_of(bias);
  p.accumulate = !base_out.is_none();
  py::array out = empty(p.out_dtype, {p.tokens, p.out_features});
  py::array hidden = empty(accumulate_dtype(p.param_dtype), {p.tokens, p.rank});
  if (p.accumulate) out[py::ellipsis()] = base_out;
  p.out = out.mutable_data();
  p.out_row_stride = p.out_features;
  p.hidden = hidden.mutable_data();
  if (level == "cuda") {
    run_emulated(p, low_rank_forward_workspace, low_rank_forward_cuda);
  } else {
    kernels(level).lowrank->forward(p);
  }
  return py::make_tuple(out, hidden);
}

py::tuple backward(const std::string& level, const py::array& grad_out, const py::array& x, const py::array& a,
                   const py::array& b, const py::array& hidden, const Index& adapter_index, double scale, uint64_t seed,
                   uint64_t offset, double dropout_p, bool want_dbias, bool want_dx, bool want_da, bool want_db) {
  LowRankBackward p{};
  fill(p, x, a, b, adapter_index, scale, seed, offset, dropout_p);
  p.grad_out = grad_out.data();
  p.grad_out_row_stride = stride(grad_out, 0);
  p.hidden = hidden.data();
  py::array dx = empty(p.x_dtype, {p.tokens, p.in_features}), dbias = empty(p.bias_dtype, {p.out_features});
  py::array da = empty(p.param_dtype, {p.adapters, p.rank, p.in_features});
  py::array db = empty(p.param_dtype, {p.adapters, p.out_features, p.rank});
  p.dx = want_dx ? dx.mutable_data() : nullptr;
  p.da = want_da ? da.mutable_data() : nullptr;
  p.db = want_db ? db.mutable_data() : nullptr;
  p.dbias = want_dbias ? dbias.mutable_data() : nullptr;
  if (level == "cuda") {
    run_emulated(p, low_rank_backward_workspace, low_rank_backward_cuda);
  } else {
    kernels(level).lowrank->backward(p);
  }
  return py::make_tuple(dx, da, db, dbias);
}

// out += a b, b given as it lies or as its transpose.
void base_product(const std::string& level, const py::array& a, const py::array& b, bool transpose, py::array out) {
  BaseProduct p{};
  p.rows = a.shape(0);
  p.depth = a.shape(1);
  p.columns = out.shape(1);
  p.dtype = dtype_of(a);
  p.a = a.data();
  p.a_row_stride = stride(a, 0);
  p.b = b.data();
  p.b_row_stride = transpose ? 1 : stride(b, 0);
  p.b_col_stride = transpose ? stride(b, 0) : 1;
  p.out = out.mutable_data();
  p.out_row_stride = stride(out, 0);
  kernels(level).lowrank->base_product(p);
}

// out += a W^T, or a W where not `transpose`, W (d_out, d_in) by way of its packed form; returns W as that gives it back.
py::array packed_product(const std::string& level, const py::array& a, const py::array& weight, bool transpose,
                         py::array out) {
  const LowRankKernels& kernels_of_level = *kernels(level).lowrank;
  PackedWeight packed{weight.shape(0), weight.shape(1), dtype_of(weight), nullptr};
  std::vector<char> blocks(
      static_cast<size_t>(kernels_of_level.packed_bytes(packed.out_features, packed.in_features, packed.dtype)));
  packed.blocks = blocks.data();
  kernels_of_level.pack_weight(packed, weight.data());
  PackedProduct p{};
  p.weight = packed;
  p.transpose = transpose;
  p.rows = a.shape(0);
  p.a = a.data();
  p.a_row_stride = stride(a, 0);
  p.out = out.mutable_data();
  p.out_row_stride = stride(out, 0);
  kernels_of_level.packed_product(p);
  py::array unpacked = empty(packed.dtype, {packed.out_features, packed.in_features});
  kernels_of_level.unpack_weight(packed, unpacked.mutable_data());
  return unpacked;
}

void bind(py::module_& m) {
  m.def("low_rank_forward", &forward);
  m.def("low_rank_backward", &backward, py::arg("level"), py::arg("grad_out"), py::arg("x"), py::arg("a"), py::arg("b"),
        py::arg("hidden"), py::arg("adapter_index"), py::arg("scale"), py::arg("seed"), py::arg("offset"),
        py::arg("dropout_p"), py::arg("want_dbias") = true, py::arg("want_dx") = true, py::arg("want_da") = true,
        py::arg("want_db") = true);
  m.def("base_product", &base_product);
  m.def("packed_product", &packed_product);
}
const Part part(bind);

}  // namespace

}  // namespace lwft::harness
