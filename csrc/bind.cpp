// laplace_kernels._cuda: tables of updates come as bytes (laplace_kernels/cuda.py packs them), addresses as integers.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <vector>

#include "launch.h"

namespace py = pybind11;

namespace {

template <class Update>
std::vector<Update> unpack(const std::string& bytes, const char* name) {
  if (bytes.size() % sizeof(Update) != 0) {
    throw py::value_error(std::string(name) + " must be a whole number of " + std::to_string(sizeof(Update)) +
                          "-byte updates, got " + std::to_string(bytes.size()) + " bytes");
  }
  std::vector<Update> updates(bytes.size() / sizeof(Update));
  std::memcpy(updates.data(), bytes.data(), bytes.size());
  return updates;
}

void flush(const std::string& grams, const std::string& sketches, bool fp16, uint64_t workspace, bool deterministic,
           uint64_t stream) {
  lk::flush(unpack<lk::Gram>(grams, "grams"), unpack<lk::Sketch>(sketches, "sketches"), fp16, workspace,
            deterministic, stream);
}

int64_t workspace_floats(const std::string& sketches, bool fp16, bool deterministic) {
  return lk::workspace_floats(unpack<lk::Sketch>(sketches, "sketches"), fp16, deterministic);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of laplace_kernels. Use them through laplace_kernels.cuda.";
  module.attr("architectures") = LK_ARCHITECTURES;
  module.def("refusal", &lk::refusal, "Why the current device cannot be served, empty if it can.");
  module.def("cluster", &lk::cluster, py::arg("d"), py::arg("m"), py::arg("fp16"),
             "Thread blocks of the cluster that serves aligned sketches of this shape, and such clusters at once.");
  module.def("workspace_floats", &workspace_floats, py::arg("sketches"), py::arg("fp16"), py::arg("deterministic"),
             "Floats of device memory that flush needs.");
  module.def("flush", &flush, py::arg("grams"), py::arg("sketches"), py::arg("fp16"), py::arg("workspace"),
             py::arg("deterministic"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
             "Issues every update on the stream of the current device.");
}
