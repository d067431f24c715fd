"""Coverage-guided fuzzing of the HTTP/2 front end, with nghttp2 and its binding under AddressSanitizer and
UndefinedBehaviorSanitizer: `make fuzz`."""
