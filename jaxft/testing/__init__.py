"""Is a method right? The checks that every method of the package passes, for one of your own."""
