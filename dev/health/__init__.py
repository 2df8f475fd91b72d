"""What GitOps tools say of a run, asked of the libraries that they use: the Go program of this folder."""
