# lwft_cpu_kernels: every *_cpu.cpp compiled once per instruction-set level, and the other csrc/common/cpu/*.cpp
# (dispatch, threads) compiled once with baseline flags.
#
# A kernel file is compiled with -DLWFT_ISA=<level> and puts all it defines into namespace lwft::LWFT_ISA. The rest of
# the code is told the levels as LWFT_ISA_LEVELS, an X-macro list in rising order: X(baseline) X(avx2) ...
include(CheckCXXCompilerFlag)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(isa_known baseline avx2 avx512 avx512_bf16)
  set(isa_flags_baseline)
  set(isa_flags_avx2 -mavx2 -mfma -mf16c)
  set(isa_flags_avx512 ${isa_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  set(isa_flags_avx512_bf16 ${isa_flags_avx512} -mavx512bf16)
else()
  set(isa_known baseline)  # on aarch64 that is NEON
  set(isa_flags_baseline)
endif()
set(LWFT_ISA_LEVELS "${isa_known}" CACHE STRING "Instruction-set levels to compile the CPU kernels for")

file(GLOB cpu_kernel_sources CONFIGURE_DEPENDS csrc/*/*_cpu.cpp csrc/common/cpu/*_cpu.cpp)
file(GLOB cpu_common_sources CONFIGURE_DEPENDS csrc/common/cpu/*.cpp)
list(FILTER cpu_common_sources EXCLUDE REGEX "_cpu\\.cpp$")

set(isa_levels)
set(isa_objects)
foreach(level IN LISTS LWFT_ISA_LEVELS)
  if(NOT level IN_LIST isa_known)
    message(FATAL_ERROR "LWFT_ISA_LEVELS: '${level}' is not one of ${isa_known} (on ${CMAKE_SYSTEM_PROCESSOR})")
  endif()
  string(REPLACE ";" " " flags "${isa_flags_${level}}")
  if(flags)
    check_cxx_compiler_flag("${flags}" LWFT_COMPILER_HAS_${level})
    if(NOT LWFT_COMPILER_HAS_${level})
      message(WARNING "${CMAKE_CXX_COMPILER} does not know ${flags}: built without the level ${level}")
      continue()
    endif()
  endif()
  list(APPEND isa_levels ${level})
  if(NOT cpu_kernel_sources)
    continue()
  endif()
  add_library(lwft_isa_${level} OBJECT ${cpu_kernel_sources})
  target_include_directories(lwft_isa_${level} PRIVATE csrc)
  target_compile_definitions(lwft_isa_${level} PRIVATE LWFT_ISA=${level})
  target_compile_options(lwft_isa_${level} PRIVATE ${isa_flags_${level}})

  # An inline function or template of a shared header (std::vector's, say) that one level emits out of line is, to the
  # linker, the same function as every other level's, and it keeps one: perhaps the one with AVX-512 in it, for all.
  # So the objects of a level become one object, in which only lwft::<level> stays visible.
  # (Not under sanitizers, whose own linker groups have to survive.)
  if(CMAKE_OBJCOPY AND NOT LWFT_SANITIZE)
    set(object ${PROJECT_BINARY_DIR}/isa/${level}.o)
    string(LENGTH ${level} length)  # as the Itanium mangling spells a name: length, then letters
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${PROJECT_BINARY_DIR}/isa
      COMMAND ${CMAKE_CXX_COMPILER} -nostdlib -r -Wl,--force-group-allocation -o ${object}
              "$<TARGET_OBJECTS:lwft_isa_${level}>"
      COMMAND ${CMAKE_OBJCOPY} --wildcard "--keep-global-symbol=_ZN4lwft${length}${level}*" ${object}
      DEPENDS "$<TARGET_OBJECTS:lwft_isa_${level}>"
      COMMENT "Closing instruction-set level ${level}"
      COMMAND_EXPAND_LISTS VERBATIM)
    list(APPEND isa_objects ${object})
  else()
    list(APPEND isa_objects "$<TARGET_OBJECTS:lwft_isa_${level}>")
  endif()
endforeach()

list(TRANSFORM isa_levels REPLACE "(.+)" "X(\\1)" OUTPUT_VARIABLE isa_list)
list(JOIN isa_list " " isa_list)
message(STATUS "CPU kernels: ${isa_levels}")

add_library(lwft_cpu_kernels STATIC ${cpu_common_sources} ${isa_objects})
set_target_properties(lwft_cpu_kernels PROPERTIES LINKER_LANGUAGE CXX)
target_include_directories(lwft_cpu_kernels PUBLIC csrc)
target_compile_definitions(lwft_cpu_kernels PUBLIC "LWFT_ISA_LEVELS=${isa_list}")
target_link_libraries(lwft_cpu_kernels PUBLIC Threads::Threads)
