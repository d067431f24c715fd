"""What benchmarks of whole servers share: requests, servers as processes, load, rounds that alternate, output."""
