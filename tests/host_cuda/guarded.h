// What the functions of a library for ctypes return: the message of what was thrown, or null.
#pragma once
#include <exception>
#include <string>

template <class F>
const char* guarded(const F& f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
