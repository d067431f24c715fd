"""What `make test-deploy` runs: the image, the compose demo and the Helm chart, on the real tools."""
