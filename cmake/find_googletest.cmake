# GoogleTest, in this order: sources given with -DBITFOLD_GOOGLETEST_SOURCE (cross builds and sanitizers need it compiled
# with their own flags), an installed package, a download of one pinned release.
set(BITFOLD_GOOGLETEST_SOURCE "" CACHE PATH "GoogleTest source folder to build instead of an installed package")
set(INSTALL_GTEST OFF)
set(BUILD_GMOCK OFF)
if(BITFOLD_GOOGLETEST_SOURCE)
  add_subdirectory("${BITFOLD_GOOGLETEST_SOURCE}" googletest EXCLUDE_FROM_ALL)
else()
  find_package(GTest CONFIG QUIET)
  if(NOT GTest_FOUND)
    include(FetchContent)
    FetchContent_Declare(googletest
      URL https://github.com/google/googletest/archive/refs/tags/v1.15.2.tar.gz
      URL_HASH SHA256=7b42b4d6ed48810c5362c265a17faebe90dc2373c885e5216439d37927f02926
      DOWNLOAD_EXTRACT_TIMESTAMP OFF)
    FetchContent_MakeAvailable(googletest)
  endif()
endif()
if(NOT TARGET GTest::gtest_main)
  add_library(GTest::gtest_main ALIAS gtest_main)
endif()
