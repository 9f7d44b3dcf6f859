{{- define "fewstep.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "fewstep.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "fewstep.labels" -}}
{{ include "fewstep.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "fewstep.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "fewstep.name" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- /* Not empty where trainers are Jobs of their own. */ -}}
{{- define "fewstep.launchesJobs" -}}
{{- if and .Values.distiller.enabled (eq .Values.distiller.launcher "kubernetes") }}true{{ end }}
{{- end }}

{{- /* Whose token such distillers have: nobody else has its rights, unless the account is yours. */ -}}
{{- define "fewstep.distillerAccount" -}}
{{- include "fewstep.serviceAccount" . }}{{ if .Values.serviceAccount.create }}-distiller{{ end }}
{{- end }}

{{- /* Image of (root, name, tag). */ -}}
{{- define "fewstep.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .name }}:{{ .tag | default $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "fewstep.authSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-auth" (include "fewstep.name" .)) }}
{{- end }}

{{- define "fewstep.redisSecret" -}}
{{- .Values.redis.existingSecret | default (printf "%s-redis" (include "fewstep.name" .)) }}
{{- end }}

{{- define "fewstep.registryClaim" -}}
{{- .Values.registry.existingClaim | default (printf "%s-registry" (include "fewstep.name" .)) }}
{{- end }}

{{- define "fewstep.publicUrl" -}}
{{- $gateway := .Values.gateway -}}
{{- if $gateway.publicUrl }}{{ $gateway.publicUrl }}
{{- else if and $gateway.ingress.enabled $gateway.ingress.host }}{{ ternary "https" "http" (ne $gateway.ingress.tlsSecret "") }}://{{ $gateway.ingress.host }}
{{- else }}http://{{ include "fewstep.name" . }}-gateway.{{ .Release.Namespace }}.svc:{{ $gateway.service.port }}
{{- end }}
{{- end }}

{{- /* Metadata of the pods of (root, component, pool?, secrets?), under `template:`. Pods start anew when a value of the
list `secrets` changes. Who may see pods could try passwords on a sum of those alone, but not with auth.urlSecret in it;
where that is kept elsewhere there is no sum. */ -}}
{{- define "fewstep.podMetadata" -}}
labels:
  {{- include "fewstep.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .pool }}
  fewstep/pool: {{ . }}
  {{- end }}
{{- $auth := .root.Values.auth }}
{{- $annotations := .root.Values.pod.annotations }}
{{- if and .secrets (not $auth.existingSecret) }}
{{- $sum := toJson (list $auth.urlSecret .secrets) | sha256sum }}
{{- $annotations = merge (dict "checksum/secrets" $sum) $annotations }}
{{- end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* What the pods of (root, at, user?, token?) have alike; `at` says where they are placed, `token` is of an account. */ -}}
{{- define "fewstep.podCommon" -}}
{{- $user := .user | default .root.Values.pod.user -}}
serviceAccountName: {{ .token | default (include "fewstep.serviceAccount" .root) }}
automountServiceAccountToken: {{ not (not .token) }}
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .at.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .at.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .at.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .at.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ $user }}
  runAsGroup: {{ $user }}
  fsGroup: {{ $user }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "fewstep.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* Redis, registry and the settings of (root, prefix, env): whatever a process is told the same way. */ -}}
{{- define "fewstep.env" -}}
- name: {{ .prefix }}_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ include "fewstep.redisSecret" .root }}
      key: url
- name: {{ .prefix }}_REGISTRY_URL
  value: {{ .root.Values.registry.url | default "/registry" | quote }}
# Caches of libraries go where the file system can be written.
- name: HOME
  value: /tmp
{{- range $name, $value := .env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "fewstep.envFrom" -}}
{{- with .Values.registry.credentialsSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
{{- end }}

{{- define "fewstep.mounts" -}}
- name: tmp
  mountPath: /tmp
{{- if not .Values.registry.url }}
- name: registry
  mountPath: /registry
{{- end }}
{{- end }}

{{- define "fewstep.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.pod.tmpSize }}
{{- if not .Values.registry.url }}
- name: registry
  persistentVolumeClaim:
    claimName: {{ include "fewstep.registryClaim" . }}
{{- end }}
{{- end }}

{{- /* A pool with what it has from `worker`: pools say only what differs. */ -}}
{{- define "fewstep.pool" -}}
{{- mergeOverwrite (deepCopy .root.Values.worker) .pool | toYaml }}
{{- end }}

{{- /* Metrics: the port that workers and distillers serve them on. */ -}}
{{- define "fewstep.metricsPort" -}}9100{{- end }}

{{- /* Contradictions that the schema cannot see. */ -}}
{{- define "fewstep.check" -}}
{{- $redis := .Values.redis -}}
{{- if and (not .Values.auth.existingSecret) (not .Values.auth.apiKeys) -}}
{{- fail "auth: set auth.existingSecret, or auth.apiKeys and auth.urlSecret: a gateway that others can reach does not start without keys" -}}
{{- end -}}
{{- if and (not .Values.auth.existingSecret) (lt (len .Values.auth.urlSecret) 16) -}}
{{- fail "auth.urlSecret: 16 characters or more are needed, the same for all gateways" -}}
{{- end -}}
{{- if and $redis.enabled $redis.url -}}
{{- fail "redis: url names a Redis elsewhere; set redis.enabled to false beside it" -}}
{{- end -}}
{{- if and $redis.enabled (not $redis.existingSecret) (not $redis.password) -}}
{{- fail "redis: set redis.password, or redis.existingSecret with the keys url and password" -}}
{{- end -}}
{{- if and (not $redis.enabled) (not $redis.url) (not $redis.existingSecret) -}}
{{- fail "redis: without one of its own the chart needs redis.url, or redis.existingSecret with the key url" -}}
{{- end -}}
{{- if and .Values.registry.url .Values.registry.existingClaim -}}
{{- fail "registry: url and existingClaim contradict each other: set one" -}}
{{- end -}}
{{- if and .Values.registry.url .Values.distiller.enabled -}}
{{- fail "registry.url: training needs a registry in a shared folder; use a claim, or set distiller.enabled to false" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.egress) (or .Values.registry.url (not $redis.enabled)) -}}
{{- fail "networkPolicy.egress: pods may reach DNS and the Redis of this chart only; allow the other Redis or the registry's store" -}}
{{- end -}}
{{- with .Values.networkPolicy -}}
{{- if and .enabled .gatewayFrom (not .metricsFrom) (or $.Values.monitoring.monitors $.Values.monitoring.prometheusUrl) -}}
{{- fail "networkPolicy.metricsFrom: gatewayFrom shuts Prometheus out of the gateways; name it in metricsFrom" -}}
{{- end -}}
{{- end -}}
{{- $names := list -}}
{{- range .Values.pools -}}
{{- if has .name $names -}}{{- fail (printf "pools: two are called %s" .name) -}}{{- end -}}
{{- $names = append $names .name -}}
{{- if and (dig "autoscaling" "enabled" $.Values.worker.autoscaling.enabled .) (not $.Values.monitoring.prometheusUrl) -}}
{{- fail (printf "pools: %s scales on queue wait, which KEDA reads from Prometheus: set monitoring.prometheusUrl" .name) -}}
{{- end -}}
{{- end -}}
{{- end }}
