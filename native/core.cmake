# The library tiermem_core, under a sanitizer if that was asked for.
file(GLOB core_sources CONFIGURE_DEPENDS src/*.cpp)
add_library(tiermem_core STATIC ${core_sources})
target_include_directories(tiermem_core PUBLIC include)
target_link_libraries(tiermem_core PUBLIC Threads::Threads)
target_compile_options(tiermem_core PRIVATE ${tiermem_warnings})
set_target_properties(tiermem_core PROPERTIES POSITION_INDEPENDENT_CODE ON)

# The attention kernels' registers are arrays until loops are unrolled, which takes -O3, and with a sanitizer
# ten minutes. Each is compiled for its instructions and chosen at run time.
set(attention_flags -O3)
if(TIERMEM_SANITIZE)
  set(attention_flags -O1)
endif()
set_source_files_properties(src/attention_portable.cpp PROPERTIES COMPILE_OPTIONS "${attention_flags}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set_source_files_properties(src/attention_avx2.cpp PROPERTIES
    COMPILE_OPTIONS "${attention_flags};-mavx2;-mfma;-mf16c")
  # gcc 12 takes the deliberately undefined operands inside its own AVX-512 headers for a defect.
  set_source_files_properties(src/attention_avx512.cpp PROPERTIES
    COMPILE_OPTIONS "${attention_flags};-mavx512f;-Wno-uninitialized;-Wno-maybe-uninitialized")
  check_cxx_source_compiles("int main() { asm volatile(\"tdpbf16ps %tmm2, %tmm1, %tmm0\"); }" TIERMEM_HAS_AMX)
  if(TIERMEM_HAS_AMX)
    target_compile_definitions(tiermem_core PRIVATE TIERMEM_HAS_AMX)
    set_source_files_properties(src/attention_amx.cpp PROPERTIES COMPILE_OPTIONS
      "${attention_flags};-mavx512f;-mavx512bw;-Wno-uninitialized;-Wno-maybe-uninitialized")
  endif()
endif()

if(TIERMEM_SANITIZE STREQUAL "address")
  set(sanitizer_flags -fsanitize=address,undefined -fno-sanitize-recover=all)
elseif(TIERMEM_SANITIZE STREQUAL "thread")
  set(sanitizer_flags -fsanitize=thread)
elseif(NOT TIERMEM_SANITIZE STREQUAL "")
  message(FATAL_ERROR "TIERMEM_SANITIZE=${TIERMEM_SANITIZE}: must be empty, address or thread")
endif()
if(TIERMEM_SANITIZE)
  target_compile_options(tiermem_core PUBLIC ${sanitizer_flags} -g -fno-omit-frame-pointer)
  target_link_options(tiermem_core PUBLIC ${sanitizer_flags})
endif()
