# _C: csrc/common/*.cpp and csrc/<room>/<room>_op.cpp, the only files that see torch, and only its stable ABI,
# with the kernels behind them. No Python.h, so one file serves every Python, and every torch from 2.10 on.
include(cmake/cuda.cmake)

if(NOT LWFT_TORCH_DIR)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/find_torch.py
    OUTPUT_VARIABLE LWFT_TORCH_DIR ERROR_VARIABLE reason RESULT_VARIABLE failed
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(failed)
    message(FATAL_ERROR "${reason}")
  endif()
endif()
message(STATUS "torch: ${LWFT_TORCH_DIR}")

file(GLOB op_sources CONFIGURE_DEPENDS csrc/common/*.cpp csrc/*/*_op.cpp)
add_library(_C MODULE ${op_sources})
set_target_properties(_C PROPERTIES PREFIX "" SUFFIX ".so" LIBRARY_OUTPUT_DIRECTORY ${LWFT_LIBRARY_DIR})
target_include_directories(_C SYSTEM PRIVATE ${LWFT_TORCH_DIR}/include)
target_compile_definitions(_C PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)  # the ABI of 2.10
target_link_libraries(_C PRIVATE lwft_cpu_kernels)
if(TARGET lwft_cuda_kernels)
  target_compile_definitions(_C PRIVATE LWFT_WITH_CUDA)
  target_link_libraries(_C PRIVATE lwft_cuda_kernels)
endif()

# libtorch.so is needed though no symbol of it is: in a CUDA build of torch it brings in libtorch_cuda, where
# the weak aoti_torch_get_current_cuda_stream is found; in a CPU build that stays null, and CUDA ops decline.
target_link_options(_C PRIVATE -L${LWFT_TORCH_DIR}/lib -Wl,-z,defs -Wl,--exclude-libs,ALL)
target_link_libraries(_C PRIVATE -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10 -Wl,--as-needed)
