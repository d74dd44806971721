// csrc/common/cpu in the harness: vector functions, conversions, tile products, dropout rows.
#include <pybind11/stl.h>

#include <cmath>

#include "harness/harness.h"
#include "harness/probes.h"

namespace lwft::harness {

namespace {

const Probes& probes(const std::string& level) { return *find_probes(kernels(level).isa); }

int64_t pairs(int64_t k) { return (k + 1) / 2; }

DType arithmetic_type(const py::array& array) {
  const DType type = dtype_of(array);
  if (element_size(type) == 2) throw py::type_error("arithmetic is in float32 or float64");
  return type;
}

Unary unary_by_name(const std::string& name) {
  if (name == "exp") return Unary::exp;
  if (name == "exp2") return Unary::exp2;
  if (name == "tanh") return Unary::tanh;
  if (name == "erf") return Unary::erf;
  if (name == "sigmoid") return Unary::sigmoid;
  throw py::value_error("no function " + name);
}

DType dtype_by_name(const std::string& name) {
  if (name == "float64") return DType::f64;
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw py::value_error("no dtype " + name);
}

ProbeMatrix matrix(const py::array& array) {
  return {dtype_of(array), array.data(), stride(array, 0), stride(array, 1)};
}

// A copy of c, or an array full of NaN.
py::array product_buffer(DType type, int64_t rows, int64_t row_stride, const py::object& c) {
  py::array buffer = empty(type, {rows, row_stride});
  if (c.is_none()) {
    buffer.attr("fill")(py::float_(std::nan("")));
  } else {
    buffer[py::ellipsis()] = c;
  }
  return buffer;
}

py::array unary(const std::string& level, const std::string& function, const py::array& x) {
  const DType type = arithmetic_type(x);
  py::array y = empty(type, {x.size()});
  probes(level).unary(type, unary_by_name(function), x.size(), x.data(), y.mutable_data());
  return y;
}

py::array sum_and_max(const std::string& level, const py::array& x) {
  const DType type = arithmetic_type(x);
  if (x.size() != probes(level).lanes(type)) throw py::value_error("want one vector");
  py::array result = empty(type, {2});
  probes(level).sum_and_max(type, x.data(), result.mutable_data());
  return result;
}

py::array convert(const std::string& level, const py::array& x, const std::string& to) {
  py::array y = empty(dtype_by_name(to), {x.size()});
  probes(level).convert(dtype_of(x), x.data(), stride(x, 0), x.size(), dtype_of(y), y.mutable_data());
  return y;
}

py::array pack_panels(const std::string& level, const py::array& b, const std::string& arithmetic) {
  const DType type = dtype_by_name(arithmetic);
  const int64_t k = b.shape(0), n = b.shape(1);
  py::array panels = empty(type, {k * probes(level).padded(type, n)});
  probes(level).pack_panels(type, matrix(b), k, n, panels.mutable_data());
  return panels;
}

// (m, ldc): the product, its padding, and `margin` more columns that must not be touched.
py::array gemm(const std::string& level, const py::array& a, const py::array& b, const py::object& c, int64_t margin) {
  const DType type = arithmetic_type(a);
  const int64_t m = a.shape(0), k = a.shape(1), n = b.shape(1);
  const py::array panels = pack_panels(level, b, type == DType::f64 ? "float64" : "float32");
  const int64_t ldc = probes(level).padded(type, n) + margin;
  py::array out = product_buffer(type, m, ldc, c);
  probes(level).gemm(type, m, n, k, a.data(), stride(a, 0), stride(a, 1), panels.data(), out.mutable_data(), ldc,
                     !c.is_none());
  return out;
}

py::array pack_pair_panels(const std::string& level, const py::array& b) {
  const int64_t k = b.shape(0), n = b.shape(1);
  py::array panels = empty(DType::bf16, {pairs(k) * probes(level).padded(DType::f32, n) * 2});
  probes(level).pack_pair_panels(matrix(b), k, n, panels.mutable_data());
  return panels;
}

// As gemm; a (m, k) either bfloat16 and row-major, or as columns of pairs, packed here (then m <= a panel's width).
py::array gemm_bfloat16(const std::string& level, const py::array& a, const py::array& b, const py::object& c,
                        int64_t margin, bool pack_a) {
  if (!probes(level).multiplies_bfloat16) throw py::value_error(level + " does not multiply bfloat16");
  const int64_t m = a.shape(0), k = a.shape(1), n = b.shape(1), ldc = probes(level).padded(DType::f32, n) + margin;
  if (!pack_a && m > 0 && k > 0 && ((k > 1 && stride(a, 1) != 1) || (m > 1 && stride(a, 0) % 2 != 0)))
    throw py::value_error("a is no matrix of pairs");
  const py::array panels = pack_pair_panels(level, b);
  const py::array a_panel = pack_pair_panels(level, a.attr("T"));
  py::array out = product_buffer(DType::f32, m, ldc, c);
  probes(level).gemm_pairs(m, n, pairs(k), pack_a ? a_panel.data() : a.data(), pack_a ? 1 : stride(a, 0) / 2,
                           pack_a ? probes(level).padded(DType::f32, m) : 1, panels.data(),
                           static_cast<float*>(out.mutable_data()), ldc, !c.is_none());
  return out;
}

// As gemm, with the rows first .. first + k - 1 of b (packed, n), k the columns of a, which may be split beforehand.
py::array gemm_parts(const std::string& level, const py::array& a, const py::array& b, const py::object& c,
                     int64_t margin, int64_t first, bool split) {
  if (probes(level).gemm_parts == nullptr) throw py::value_error(level + " does not split floats");
  const int64_t m = a.shape(0), k = a.shape(1), packed = b.shape(0), n = b.shape(1);
  if (first % 32 != 0 || first + k > packed || (split && k < packed)) throw py::value_error("no such rows");
  py::array panels = empty(DType::f32, {probes(level).part_panels(packed, n)});
  probes(level).pack_part_panels(matrix(b), packed, n, panels.mutable_data());
  const int64_t ldc = probes(level).padded(DType::f32, n) + margin;
  py::array out = product_buffer(DType::f32, m, ldc, c);
  probes(level).gemm_parts(m, n, k, static_cast<const float*>(a.data()), stride(a, 0), stride(a, 1), panels.data(),
                           first, packed, static_cast<float*>(out.mutable_data()), ldc, !c.is_none(), split);
  return out;
}

// (m, n + margin); `product` is Probes::dot_rows or combine_rows, b as that wants it.
py::array few_rows(decltype(Probes::dot_rows) product, int64_t n, const py::array& a, const py::array& b,
                   const py::object& c, int64_t margin) {
  const DType type = arithmetic_type(a);
  py::array out = product_buffer(type, a.shape(0), n + margin, c);
  product(type, a.shape(0), n, a.shape(1), a.data(), stride(a, 0), matrix(b), out.mutable_data(), n + margin,
          !c.is_none());
  return out;
}

py::array dropout_multipliers(const std::string& level, const std::string& arithmetic, uint64_t seed, uint64_t offset,
                              double p, int64_t row, int64_t col0, int64_t n) {
  const DType type = dtype_by_name(arithmetic);
  py::array out = empty(type, {n});
  probes(level).dropout_multipliers(type, make_dropout(seed, offset, p), row, col0, n, out.mutable_data());
  return out;
}

py::array dropout_row(const std::string& level, uint64_t seed, uint64_t offset, double p, int64_t row, int64_t col0,
                      const py::array& values) {
  py::array out = empty(arithmetic_type(values), {values.size()});
  out[py::ellipsis()] = values;
  probes(level).dropout_row(dtype_of(out), make_dropout(seed, offset, p), row, col0, out.size(), out.mutable_data());
  return out;
}

std::vector<uint32_t> philox(const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
  const PhiloxWords words =
      philox4x32_10(counter.at(0), counter.at(1), counter.at(2), counter.at(3), key.at(0), key.at(1));
  return {words.word, words.word + 4};
}

std::vector<int64_t> run_tasks(const std::string& level, int64_t tasks, bool fail) {
  std::vector<int64_t> results(static_cast<size_t>(tasks), -1);
  const py::gil_scoped_release without_gil;
  probes(level).run_tasks(tasks, fail, results.data());
  return results;
}

void bind_common(py::module_& m) {
  using py::arg;
  m.def("lanes", [](const std::string& level, const std::string& arithmetic) {
    return probes(level).lanes(dtype_by_name(arithmetic));
  });
  m.def("unary", unary, arg("level"), arg("function"), arg("x"));
  m.def("sum_and_max", sum_and_max, arg("level"), arg("x"));
  m.def("convert", convert, arg("level"), arg("x"), arg("to"));
  m.def("pack_panels", pack_panels, arg("level"), arg("b"), arg("arithmetic"));
  m.def("multiplies_bfloat16", [](const std::string& level) { return probes(level).multiplies_bfloat16; });
  m.def("pack_pair_panels", pack_pair_panels, arg("level"), arg("b"));
  m.def("gemm_bfloat16", gemm_bfloat16, arg("level"), arg("a"), arg("b"), arg("c") = py::none(), arg("margin") = 0,
        arg("pack_a") = false);
  m.def("splits_float", [](const std::string& level) { return probes(level).gemm_parts != nullptr; });
  m.def("gemm_parts", gemm_parts, arg("level"), arg("a"), arg("b"), arg("c") = py::none(), arg("margin") = 0,
        arg("first") = 0, arg("split") = false);
  m.def("gemm", gemm, arg("level"), arg("a"), arg("b"), arg("c") = py::none(), arg("margin") = 0);
  m.def(
      "dot_rows",
      [](const std::string& level, const py::array& a, const py::array& b, const py::object& c, int64_t margin) {
        return few_rows(probes(level).dot_rows, b.shape(0), a, b, c, margin);
      },
      arg("level"), arg("a"), arg("b"), arg("c") = py::none(), arg("margin") = 0);
  m.def(
      "combine_rows",
      [](const std::string& level, const py::array& a, const py::array& b, const py::object& c, int64_t margin) {
        return few_rows(probes(level).combine_rows, b.shape(1), a, b, c, margin);
      },
      arg("level"), arg("a"), arg("b"), arg("c") = py::none(), arg("margin") = 0);
  m.def("dropout_multipliers", dropout_multipliers, arg("level"), arg("arithmetic"), arg("seed"), arg("offset"),
        arg("p"), arg("row"), arg("col0"), arg("n"));
  m.def("dropout_row", dropout_row, arg("level"), arg("seed"), arg("offset"), arg("p"), arg("row"), arg("col0"),
        arg("values"));
  m.def("philox", philox, arg("counter"), arg("key"));
  m.def("philox_draw", philox_draw, arg("seed"), arg("offset"), arg("row"), arg("col"));
  m.def("run_tasks", run_tasks, arg("level"), arg("tasks"), arg("fail") = false);
  m.def(
      "peak_flops",
      [](const std::string& level, const std::string& arithmetic, double seconds) {
        return probes(level).peak_flops(dtype_by_name(arithmetic), seconds);
      },
      arg("level"), arg("arithmetic") = "float32", arg("seconds") = 0.5);
}

const Part common(bind_common);

}  // namespace

}  // namespace lwft::harness
