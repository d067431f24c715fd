variable "name" {
  description = "The region, as the sidecars and their peers call it."
  type        = string
}

variable "namespace" {
  description = "It is made."
  type        = string
  default     = "ratelimit"
}

variable "release" {
  description = "Helm's name of it."
  type        = string
  default     = "rl"
}

variable "chart" {
  description = "A chart elsewhere; the one in deploy/helm when null."
  type        = string
  default     = null
}

variable "image" {
  description = "As the chart's value of that name."
  type = object({
    repository = string
    tag        = optional(string)
    digest     = optional(string)
  })
}

variable "rules" {
  description = "Rules files by name."
  type        = map(string)
}

variable "mesh" {
  description = "This region's of the mesh module's regions."
  type = object({
    peers      = list(string)
    peer_names = string
  })
}

variable "certificate" {
  description = "This region's of the mesh module's certificates: PEM."
  type = object({
    certificate = string
    key         = string
    ca          = string
  })
  sensitive = true
}

variable "dns_name" {
  description = "Where external-dns publishes the addresses of this region's pods; null where nothing does."
  type        = string
  default     = null
}

variable "peer_cidrs" {
  description = "Address ranges of the other regions' pods."
  type        = list(string)
  default     = []
}

variable "values" {
  description = "More values of the chart, as YAML; later ones win."
  type        = list(string)
  default     = []
}
