# What only tests need: the CUDA kernels on the CPU, the pybind11 harness, the C++ tests.

# lwft_emulated_cuda: the same csrc/<room>/<room>_cuda.cu, compiled as C++ over the host side of the portable
# header in csrc/common/cuda. A one-line file includes each, since CMake gives a file one language only.
file(GLOB emulated_cuda CONFIGURE_DEPENDS csrc/*/*_cuda.cu)
file(GLOB emulator_sources CONFIGURE_DEPENDS csrc/common/cuda/*.cpp)
set(emulated_sources)
foreach(source IN LISTS emulated_cuda)
  get_filename_component(name ${source} NAME_WE)
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/emulated/${name}.cpp CONTENT "#include \"${source}\"\n" @ONLY)
  list(APPEND emulated_sources ${PROJECT_BINARY_DIR}/emulated/${name}.cpp)
endforeach()
if(emulated_sources OR emulator_sources)
  add_library(lwft_emulated_cuda STATIC ${emulator_sources} ${emulated_sources})
  target_include_directories(lwft_emulated_cuda PUBLIC csrc)
  target_compile_options(lwft_emulated_cuda PUBLIC -Wno-unknown-pragmas)  # nvcc's "unroll"
  target_link_libraries(lwft_emulated_cuda PUBLIC Threads::Threads)
endif()

# lwft_probes: csrc/harness/*_cpu.cpp, which call the inline functions of common/cpu, per level as kernels are.
file(GLOB probe_sources CONFIGURE_DEPENDS csrc/harness/*_cpu.cpp)
lwft_compile_per_level(probes ${probe_sources})
add_library(lwft_probes STATIC ${probes_objects})
set_target_properties(lwft_probes PROPERTIES LINKER_LANGUAGE CXX)

add_library(lwft_test_kernels INTERFACE)
target_link_libraries(lwft_test_kernels INTERFACE lwft_probes lwft_cpu_kernels
                                                  $<TARGET_NAME_IF_EXISTS:lwft_emulated_cuda>)

if(LWFT_HARNESS)
  file(GLOB harness_sources CONFIGURE_DEPENDS csrc/harness/*.cpp)
  list(REMOVE_ITEM harness_sources ${probe_sources})
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.Module)
  if(NOT Python_Development.Module_FOUND)
    message(FATAL_ERROR "LWFT_HARNESS: ${Python_EXECUTABLE} comes without its C headers (Python.h): install "
                        "them, e.g. Debian's python3-dev")
  endif()
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir OUTPUT_VARIABLE pybind11_DIR
                  OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "LWFT_HARNESS: ${Python_EXECUTABLE} has no pybind11: pip install pybind11")
  endif()
  set(PYBIND11_FINDPYTHON ON)
  find_package(pybind11 REQUIRED CONFIG)
  if(harness_sources)
    pybind11_add_module(lwft_harness NO_EXTRAS ${harness_sources})
    target_link_libraries(lwft_harness PRIVATE lwft_test_kernels)
  endif()
endif()

if(LWFT_TESTS)
  enable_testing()
  # The thread sanitizer of older compilers cannot live with as much address randomisation as newer kernels do.
  # Where that may not be switched off either, the tests are listed as skipped.
  set(launcher ${CMAKE_CROSSCOMPILING_EMULATOR})
  if(LWFT_SANITIZE STREQUAL "thread")
    execute_process(COMMAND setarch --addr-no-randomize true RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
    if(NOT failed)
      set(launcher setarch --addr-no-randomize)
    endif()
  endif()
  file(GLOB test_sources CONFIGURE_DEPENDS csrc/tests/*_test.cpp)
  if(LWFT_SANITIZE STREQUAL "thread")
    # Emulated CUDA runs on one thread and switches stacks by hand, which this sanitizer does not follow.
    list(FILTER test_sources EXCLUDE REGEX "/cuda_[^/]*$")
  endif()
  foreach(source IN LISTS test_sources)
    get_filename_component(name ${source} NAME_WE)
    add_executable(${name} ${source})
    target_link_libraries(${name} PRIVATE lwft_test_kernels)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
    add_test(NAME ${name} COMMAND ${launcher} $<TARGET_FILE:${name}>)
    set_tests_properties(${name} PROPERTIES TIMEOUT 300
                         SKIP_REGULAR_EXPRESSION "FATAL: ThreadSanitizer: unexpected memory mapping")
  endforeach()
endif()
